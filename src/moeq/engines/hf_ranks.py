"""One of several processes that share a model's experts: expert parallelism under torchrun.

    distributed = DistributedConfig(tp_size=2, ep_size=2)
    from_pretrained(path, quantization_config=config, distributed_config=distributed)

transformers hands every rank a contiguous run of each layer's experts. It wraps the experts'
forward: every rank gets all tokens, ids of other ranks' experts become one past the last local one,
and the ranks' outputs are summed (or, where gradients flow, tokens travel to their experts). All of
that works on our forward as on its own. Ours is which experts' tensors are read: those of the rank
and no others, into storage of their number. What is not quantized goes through transformers, which
knows how it is split.

Left out, and refused before anything is allocated: experts cut across their matrices (tensor
parallelism without expert parallelism), FSDP, and pipelines. A scale of such an expert's down
projection would span ranks.

Written against `transformers.distributed` of 5.23; releases before `DistributedConfig.ep_size` are
refused.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moeq.engines.hf_routes import quantized_names
from moeq.engines.hf_structure import Target
from moeq.errors import ModelError

_WHOLE = "replicate"
"""transformers' rule for what every rank has whole."""

_USE_EXPERTS = "split by expert: DistributedConfig(tp_size={0}, ep_size={0})"


@dataclass(frozen=True)
class Ranks:
    """Which of the processes that share the experts this one is.

    Attributes:
        count: of processes.
        index: of this one.
        rules: how transformers splits the model's other modules, by names with `*` for numbers.
    """

    count: int
    index: int
    rules: dict[str, str]

    def split(self, target: Target) -> Target:
        """A layer with this rank's experts alone.

        Raises:
            ModelError: the ranks cannot share it.
        """
        shape = target.shape
        if shape.kind == "linear":
            name = re.sub(r"\.\d+(?=\.|$)", ".*", shape.name)
            rule = self.rules.get(name, self.rules.get(f"{name}.weight", _WHOLE))
            if rule != _WHOLE:
                raise ModelError(
                    f"{shape.name}: transformers splits it over ranks ({rule}), which moeq does not"
                    " do with quantized linears",
                    hint="quantize the experts alone, with moe=... instead of a scheme for both, or"
                    f" keep it whole: DistributedConfig(tp_plan={{{name!r}: {_WHOLE!r}}})",
                )
            return target
        if shape.num_experts % self.count:
            raise ModelError(
                f"{shape.name} has {shape.num_experts} experts, which {self.count} ranks cannot"
                " share evenly",
                hint="take a number of ranks that divides the number of experts",
            )
        each = shape.num_experts // self.count
        local = range(self.index * each, (self.index + 1) * each)
        return dataclasses.replace(target, shape=dataclasses.replace(shape, local_experts=local))

    def distribute(self, target: Target, device: torch.device) -> None:
        """Tell transformers, which loads codes of a saved checkpoint, that ours are a share."""
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor import DTensor, Shard

        if target.shape.kind == "linear":
            return
        mesh = init_device_mesh(device.type, (self.count,))
        module: Any = target.module
        module.num_experts = len(target.shape.experts)  # as transformers does for its own
        for name in quantized_names(module):
            local = module._parameters[name].data
            share = DTensor.from_local(local, mesh, [Shard(0)], run_check=False)
            module._parameters[name] = nn.Parameter(share, requires_grad=False)

    def keep_local(self, target: Target) -> None:
        """Undo `distribute`: kernels take this rank's tensors."""
        module = target.module
        for name in quantized_names(module):
            found = module._parameters[name]
            assert found is not None
            module._parameters[name] = nn.Parameter(local_part(found.data), requires_grad=False)

    def check(self, target: Target) -> None:
        """That transformers splits a layer as we took it to.

        Raises:
            ModelError: it does not.
        """
        if target.shape.kind == "linear":
            return
        originals = target.module._parameters.get(target.up_name)  # a saved checkpoint has none
        held = len(target.shape.experts)
        found = held if originals is None else len(local_part(originals))
        if found != held or "forward" not in vars(target.module):
            raise ModelError(
                f"{target.shape.name}: transformers does not hand {held} of its"
                f" {target.shape.num_experts} experts to each rank",
                hint="the model's expert-parallel plan does not cover the layer; add its rules to"
                " DistributedConfig(ep_plan=...), or load in one process",
            )


def ranks_of(model: Any) -> Ranks | None:
    """The ranks that the `DistributedConfig` of a model's load asks for; None where it is alone.

    Raises:
        ModelError: they split the model in a way that moeq cannot.
    """
    config = getattr(model.config, "distributed_config", None)
    if config is None:
        return None
    sizes = {name: getattr(config, name, 1) or 1 for name in _SIZES}
    if all(size == 1 for size in sizes.values()):
        return None
    count = sizes["tp_size"]
    if not hasattr(config, "ep_size"):
        raise ModelError(
            "the installed transformers splits experts in a way that moeq does not know",
            hint="ranks need transformers 5.23 or newer",
        )
    for name, kind in _FOREIGN.items():
        if sizes[name] > 1:
            raise ModelError(
                f"{name}={sizes[name]}: moeq does not load models under {kind}",
                hint=_USE_EXPERTS.format("N"),
            )
    if sizes["ep_size"] == 1:
        raise ModelError(
            f"tp_size={count} without ep_size cuts the matrices of every expert, and their scales"
            " would span ranks",
            hint=_USE_EXPERTS.format(count),
        )
    if config.ep_implementation == "deepgemm_megamoe":
        raise ModelError(
            "ep_implementation='deepgemm_megamoe' runs kernels of its own on unquantized experts",
            hint="leave it at 'auto'",
        )
    own = config.tp_plan if isinstance(config.tp_plan, dict) else {}
    return Ranks(count, torch.distributed.get_rank(), {**model.tp_plan, **own})


def local_part(tensor: Any) -> Tensor:
    """What this rank holds of a parameter."""
    part: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return part


def local_bytes(model: nn.Module) -> int:
    """Of the parameters of a model, on this rank."""
    return sum(local_part(parameter).nbytes for parameter in model.parameters())


_FOREIGN = {
    "fsdp_size": "FSDP",
    "dp_replicate_size": "FSDP",
    "pp_size": "pipeline parallelism",
}

_SIZES = ("tp_size", "ep_size", *_FOREIGN)
