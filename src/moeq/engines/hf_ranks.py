"""One of several processes that share a model under torchrun: expert or tensor parallelism.

    distributed = DistributedConfig(tp_size=2, ep_size=2)      # whole experts on each rank
    distributed = DistributedConfig(tp_size=2)                 # a part of every expert on each
    from_pretrained(path, quantization_config=config, distributed_config=distributed)

transformers wraps the experts' forward, and what it does there works on ours as on its own. By
expert, a rank has a contiguous run of them: it gets all tokens, ids of other ranks' experts become
one past the last local one, and the ranks' outputs are summed (or, where gradients flow, tokens
travel to their experts). Otherwise it has some of the I channels between the projections of every
expert, and outputs are summed too.

Ours is what is read and held: of other ranks' experts nothing; of other ranks' channels no rows of
gate and up where a file has rows together, but all of down, because the scale of a row of down
spans the ranks. Who reads columns reads nearly everything anyway, and needs nobody to ask. So codes
and scales are, to the bit, parts of those that one process would have. What is not quantized goes
through transformers, which knows how it is split.

Left out, and refused before anything is allocated: channels under schemes that quantize activations
(a token's scale would be another on every rank), channels of experts with biases or with a norm
behind them (each rank would add them), quantized linears that transformers splits, FSDP, pipelines.

Written against `transformers.distributed` of 5.23. Earlier releases are refused: they split experts
in other ways, and under 5.21 and 5.22 logits come out wrong.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
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
        by_expert: whether each has whole experts, and not a part of every one.
        rules: how transformers splits the model's other modules, by names with `*` for numbers.
    """

    count: int
    index: int
    by_expert: bool
    rules: dict[str, str]

    def split(self, target: Target) -> Target:
        """A layer with this rank's experts alone, or channels.

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
        if self.by_expert:
            local = self._share(target, shape.num_experts, "experts")
            shape = dataclasses.replace(shape, local_experts=local)
        else:
            self._check_channels(target)
            local = self._share(target, shape.intermediate_size, "intermediate channels")
            shape = dataclasses.replace(shape, local_channels=local)
        return dataclasses.replace(target, shape=shape)

    def _share(self, target: Target, total: int, what: str) -> range:
        if total % self.count:
            raise ModelError(
                f"{target.shape.name} has {total} {what}, which {self.count} ranks cannot share"
                " evenly",
                hint=f"take a number of ranks that divides {total}",
            )
        each = total // self.count
        return range(self.index * each, (self.index + 1) * each)

    def _check_channels(self, target: Target) -> None:
        reason = ""
        if target.scheme.quantizes_activations:
            reason = f"{target.scheme.value} quantizes activations with a scale per token"
        elif target.shape.has_bias:
            reason = "each would add the biases of its experts"
        elif getattr(target.module, "has_post_expert_norm", False):
            reason = "a norm follows each expert"
        if reason:
            raise ModelError(
                f"{target.shape.name}: ranks cannot each hold a part of every expert: {reason}",
                hint=_USE_EXPERTS.format(self.count),
            )

    def distribute(self, targets: Iterable[Target], device: torch.device) -> None:
        """Tell transformers, which loads codes of a saved checkpoint, that ours are a share."""
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor import distribute_tensor

        mesh = init_device_mesh(device.type, (self.count,))
        for target in targets:
            if target.shape.kind == "linear":
                continue
            module: Any = target.module
            if self.by_expert:
                module.num_experts = len(target.shape.experts)  # as transformers does for its own
            for name in quantized_names(module):
                local = module._parameters[name]
                dim, placement = self._placement(target, name)
                shape = list(local.shape)
                if dim is not None:
                    shape[dim] *= self.count
                whole = torch.empty(shape, dtype=local.dtype, device="meta")
                share = distribute_tensor(whole, mesh, [placement], src_data_rank=None)
                module._parameters[name] = nn.Parameter(share, requires_grad=False)

    def _placement(self, target: Target, name: str) -> tuple[int | None, Any]:
        """The dimension along which one of our parameters is split, and how."""
        from torch.distributed.tensor import Replicate, Shard
        from torch.distributed.tensor.placement_types import _StridedShard

        if self.by_expert:
            return 0, Shard(0)
        if name == "w2_scale":
            return None, Replicate()
        if name in ("w2_codes", "w2_group_scale"):
            return 2, Shard(2)
        # A part of gate, then the same of up
        return 1, _StridedShard(1, split_factor=2) if target.shape.is_gated else Shard(1)

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
        shape = target.shape
        originals = target.module._parameters.get(target.up_name)  # a saved checkpoint has none
        is_split = True
        if originals is not None:
            experts, part = len(shape.experts), local_part(originals)
            is_split = len(part) == experts and part.numel() * self.count == originals.numel()
        if not is_split or "forward" not in vars(target.module):
            plan = "ep_plan" if self.by_expert else "tp_plan"
            raise ModelError(
                f"{shape.name}: transformers does not split its experts over {self.count} ranks",
                hint=f"the model's plan does not cover the layer: add rules for it to"
                f" DistributedConfig({plan}=...), or load in one process",
            )


def ranks_of(model: Any) -> Ranks | None:
    """The ranks that the `DistributedConfig` of a model's load asks for; None where it is alone.

    Raises:
        ModelError: they split the model in a way that moeq cannot.
    """
    config = getattr(model.config, "distributed_config", None)
    if config is None or not (
        torch.distributed.is_available() and torch.distributed.is_initialized()
    ):
        return None
    sizes = {name: getattr(config, name, 1) or 1 for name in _SIZES}
    if all(size == 1 for size in sizes.values()):
        return None
    count = sizes["tp_size"]
    if not hasattr(config, "ep_implementation"):
        raise ModelError(
            f"transformers {transformers.__version__} splits experts in a way of its own",
            hint="for a model on several ranks moeq needs transformers 5.23 or newer",
        )
    for name, kind in _FOREIGN.items():
        if sizes[name] > 1:
            raise ModelError(
                f"{name}={sizes[name]}: moeq does not load models under {kind}",
                hint=_USE_EXPERTS.format("N"),
            )
    if config.ep_implementation == "deepgemm_megamoe":
        raise ModelError(
            "ep_implementation='deepgemm_megamoe' runs kernels of its own on unquantized experts",
            hint="leave it at 'auto'",
        )
    own = config.tp_plan if isinstance(config.tp_plan, dict) else {}
    by_expert = sizes["ep_size"] > 1
    return Ranks(count, torch.distributed.get_rank(), by_expert, {**model.tp_plan, **own})


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
