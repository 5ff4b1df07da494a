"""moeq's methods as vLLM's layers call them.

Tensors are quantized as they arrive: vLLM's loader hands every expert's projection, whole, to the
`weight_loader` of a parameter. Ours takes this rank's experts (expert parallelism) or channels
(tensor parallelism) and quantizes them into final storage, in fp32, with the scales of whole rows,
blocks or matrices, so that ranks share nothing but their outputs and no layer exists in bf16.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import get_current_vllm_config
from vllm.distributed import get_tp_group
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe import FusedMoEMethodBase, RoutedExperts
from vllm.model_executor.layers.linear import (
    LinearBase,
    LinearMethodBase,
    UnquantizedLinearMethod,
)

from moeq.errors import CheckpointError, ModelError
from moeq.kernels.activations import ACTIVATIONS
from moeq.methods.base import Gate, OnlineMoEMethodBase, Projection
from moeq.methods.linear import OnlineLinearMethod
from moeq.methods.parameters import finite_scales
from moeq.quantize import amax
from moeq.schemes import BLOCK, Granularity, OnlineQuantScheme

logger = init_logger("vllm.moeq")

_SWIGLU_ALPHA, _SWIGLU_LIMIT = 1.702, 7.0
"""Of vLLM's swigluoai, which takes no others."""

_PROJECTIONS: dict[str, Projection] = {"w1": "gate", "w3": "up", "w2": "down"}


class MoeqMoEMethod(FusedMoEMethodBase):  # type: ignore[misc]
    """The experts of one layer.

    Args:
        name: of the layer.
        method: which quantizes them.
        layer: vLLM's.
    """

    def __init__(self, name: str, method: OnlineMoEMethodBase, layer: RoutedExperts) -> None:
        super().__init__(layer.moe_config)
        self._name = name
        self._method = method
        self._is_loaded = False

    def create_weights(
        self,
        layer: RoutedExperts,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        moe = self.moe
        self._is_clamped = layer.activation.value == "swigluoai"
        self._check(hidden_size, intermediate_size_per_partition)
        first = moe.tp_rank * intermediate_size_per_partition
        channels = range(first, first + intermediate_size_per_partition)
        local = _local_experts(layer.expert_map)
        self._method.create_weights(
            layer,
            num_experts=moe.num_experts,
            hidden_size=hidden_size,
            intermediate_size=intermediate_size_per_partition * moe.tp_size,
            is_gated=moe.is_act_and_mul,
            has_bias=moe.has_bias,
            dtype=params_dtype,
            local_experts=local,
            local_channels=channels if moe.tp_size > 1 else None,
        )
        device = torch.get_default_device()
        self._activation, self._gate = _activation(layer, self._name)
        self._method.select_backend(device, self._activation)
        self._method.materialize(layer, device)
        self._device = device
        # By global id, in the order of slots; a dictionary, because every tensor asks
        self._experts = dict.fromkeys(range(moe.num_experts) if local is None else local)
        # What vLLM's loader looks for: codes' stand-ins without memory, and biases
        for name in ("w13", "w2"):
            shape = layer.get_parameter(f"{name}_codes").shape
            data = {f"{name}_weight": torch.empty(shape, dtype=params_dtype, device="meta")}
            if moe.has_bias:
                data[f"{name}_bias"] = layer.get_parameter(f"{name}_bias").data
            for own, tensor in data.items():
                layer.register_parameter(own, _Arriving(tensor, requires_grad=False))
                layer.get_parameter(own).weight_loader = _Loader(self, layer)
                layer.get_parameter(own).hand_over = functools.partial(self.arrive_all, layer, own)

    def arrive(
        self, layer: RoutedExperts, expert: int, shard: str, tensor: Tensor, name: str
    ) -> bool:
        """One projection of one expert, or its bias, whole.

        Returns:
            Whether the expert is held here.
        """
        if self._is_loaded:  # a new set of weights begins
            self._method.restore(layer)
            self._method.expect_all()
            self._is_loaded = False
        projection = _PROJECTIONS[shard]
        if projection == "gate" and not self.moe.is_act_and_mul:
            projection = "up"  # vLLM's first, where there is one
        what = f"{name}, {shard} of expert {expert}"
        if name.endswith("_bias"):
            self._method.load_bias(layer, expert, projection, tensor.to(self._device), what)
        else:
            self._method.load_expert(layer, expert, projection, tensor, what)
        return expert in self._experts

    def arrive_all(self, layer: RoutedExperts, name: str, tensor: Tensor) -> None:
        """All experts that are held here, [E, ...] in the order of their slots, as models with
        vLLM's swigluoai have them: rows of gate and up alternate."""
        if not self._is_clamped:
            raise ModelError(
                f"{self._name}.{name}: this model copies its experts itself, in an order that"
                " moeq's plugin does not know",
                hint="run the model in moeq's transformers engine",
            )
        if len(tensor) != len(self._experts):
            raise CheckpointError(
                f"{self._name}.{name}: {len(tensor)} experts, expected {len(self._experts)}"
            )
        for expert, whole in zip(self._experts, tensor):
            if name.startswith("w2_"):
                self.arrive(layer, expert, "w2", whole, name)
            else:
                self.arrive(layer, expert, "w1", whole[0::2], name)
                self.arrive(layer, expert, "w3", whole[1::2], name)

    def process_weights_after_loading(self, layer: RoutedExperts) -> None:
        if self._is_loaded:
            return
        if get_current_vllm_config().load_config.load_format == "dummy":
            _fill(layer)
            self._method.expect_nothing()
        self._method.check_arrived(self._name)
        if not bool(finite_scales(layer)):
            raise CheckpointError(f"{self._name}: NaN or Inf among the weights of its experts")
        for name in ("w13_bias", "w2_bias") if self.moe.has_bias else ():
            plain = nn.Parameter(layer.get_parameter(name).data, requires_grad=False)
            layer.register_parameter(name, plain)  # for compilers
        self._method.process_weights_after_loading(
            layer, activation=self._activation, gate=self._gate
        )
        self._method.arrange(layer)  # anew, where these are not the first weights
        self._is_loaded = True
        choice = self._method.choice
        assert choice is not None
        logger.info_once(
            "moeq: experts in %s, kernels: %s%s",
            self._method.scheme.value,
            choice.backend.name,
            f" ({choice.note})" if choice.note else "",
        )

    def get_fused_moe_quant_config(self, layer: RoutedExperts) -> None:
        return None

    def apply(
        self,
        layer: RoutedExperts,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared_experts: Any = None,
        shared_experts_input: Tensor | None = None,
    ) -> Tensor:
        if layer.expert_map is not None:  # -1, which adds nothing, for other ranks' experts
            topk_ids = layer.expert_map[topk_ids.long()]
        return self._method.apply(layer, x, topk_ids, topk_weights)

    def _check(self, hidden_size: int, intermediate_size: int) -> None:
        """That vLLM asks for nothing that would be dropped silently."""
        moe = self.moe
        reason = ""
        if hidden_size != (moe.hidden_dim_unpadded or hidden_size):
            reason = f"its hidden size is padded to {hidden_size}"
        elif intermediate_size != (
            moe.intermediate_size_per_partition_unpadded or intermediate_size
        ):
            reason = f"its intermediate size is padded to {intermediate_size}"
        elif any(
            given not in (None, default)
            for given, default in (
                (moe.swiglu_limit, _SWIGLU_LIMIT if self._is_clamped else None),
                (moe.swiglu_alpha, _SWIGLU_ALPHA if self._is_clamped else None),
            )
        ):
            reason = "its gate is clamped in a way of its own"
        elif moe.is_lora_enabled:
            reason = "LoRA is enabled"
        if reason:
            raise ModelError(
                f"{self._name}: {reason}, which moeq's plugin does not do",
                hint=f"leave the layer to vLLM: ignore=[{self._name!r}]",
            )


class _Arriving(nn.Parameter):
    """A parameter into which a model of vLLM may copy all experts itself."""

    hand_over: Callable[[Tensor], None]

    def copy_(self, other: Tensor, non_blocking: bool = False) -> _Arriving:
        self.hand_over(other)
        return self


class _Loader:
    """`weight_loader` of the parameters of experts. An object, because vLLM calls it with keywords
    and asks it whether it knows experts."""

    supports_moe_loading = True

    def __init__(self, method: MoeqMoEMethod, layer: RoutedExperts) -> None:
        self._method = method
        self._layer = layer

    def __call__(
        self,
        param: nn.Parameter,
        loaded_weight: Tensor,
        weight_name: str,
        shard_id: str | None = None,
        expert_id: int | None = None,
        return_success: bool = False,
    ) -> bool | None:
        if shard_id not in _PROJECTIONS or expert_id is None:
            raise ModelError(
                f"{weight_name}: vLLM loads these experts in a way of the model's own"
                f" (shard {shard_id!r} of expert {expert_id}), which moeq's plugin does not know",
                hint="run the model in moeq's transformers engine",
            )
        found = self._method.arrive(self._layer, expert_id, shard_id, loaded_weight, weight_name)
        return found if return_success else None

    def __deepcopy__(self, memo: dict[int, Any]) -> _Loader:
        return self


class MoeqLinearMethod(LinearMethodBase):  # type: ignore[misc]
    """One linear layer: loaded by vLLM, then quantized.

    vLLM merges linears that have the same input. A scale per tensor is one for each of those, as in
    the checkpoint; then a kernel with a scale per row runs, to the same numbers.

    Args:
        name: of the layer.
        scheme: of its weights.
        backend: kernels to use instead of the oracle's choice.
    """

    def __init__(self, name: str, scheme: OnlineQuantScheme, backend: str | None) -> None:
        self._name = name
        self._grain = scheme.granularity
        if self._grain is Granularity.TENSOR:
            scheme = OnlineQuantScheme.FP8_PER_CHANNEL
        self._method = OnlineLinearMethod(scheme, backend=backend)
        self._plain = UnquantizedLinearMethod()

    def create_weights(
        self,
        layer: LinearBase,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        outputs = sum(output_partition_sizes)
        self._parts = output_partition_sizes
        self._is_row_split = input_size_per_partition != input_size
        self._is_split = self._is_row_split or outputs != output_size
        sizes = [input_size_per_partition] if self._is_row_split else output_partition_sizes
        size, what = 1, ""
        if self._grain is Granularity.BLOCK:
            size, what = BLOCK, f"blocks of {BLOCK} x {BLOCK} weights"
        elif self._is_row_split and self._method.scheme.group is not None:
            size = self._method.scheme.group
            what = f"groups of {size} weights"
        if self._is_split and any(part % size for part in sizes):
            raise ModelError(
                f"{self._name}: tensor parallelism cuts it into parts of {sizes}, which divide"
                f" {what} that share a scale",
                hint="use fewer ranks, or a scheme with a scale per channel",
            )
        self._method.create_weights(
            layer, in_features=input_size_per_partition, out_features=outputs, dtype=params_dtype
        )
        self._method.select_backend(torch.get_default_device())
        self._plain.create_weights(
            layer,
            input_size_per_partition,
            output_partition_sizes,
            input_size,
            output_size,
            params_dtype,
            **extra_weight_attrs,
        )
        layer.weight.data.fill_(torch.nan)  # so that what never arrives is found

    def process_weights_after_loading(self, layer: LinearBase) -> None:
        if self._method.choice is not None:
            return
        weight = layer.weight.data
        if get_current_vllm_config().load_config.load_format == "dummy":
            weight.normal_(std=0.01)
        if bool(torch.isnan(weight).any()):
            raise CheckpointError(
                f"{self._name}.weight: NaN, or some of it never arrived",
                hint="the checkpoint is damaged or incomplete",
            )
        self._method.load(layer, weight, self._name, weight.device, amax=self._whole_amax(weight))
        if not bool(finite_scales(layer)):  # nothing else looks for Inf on a GPU
            raise CheckpointError(
                f"{self._name}.weight: Inf among its values", hint="the checkpoint is damaged"
            )
        del layer.weight
        self._method.process_weights_after_loading(layer)
        # Latent attention asks where it is, and then multiplies by the identity. No parameter
        layer.__dict__["weight"] = layer.get_parameter("weight_codes")

    def apply(self, layer: LinearBase, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return self._method.apply(layer, x, bias)

    def _whole_amax(self, weight: Tensor) -> Tensor | None:
        """Of every row and all that shares its scale, on other ranks too; None where rows are whole
        and share none."""
        if self._grain is Granularity.TENSOR:
            parts = torch.split(weight, self._parts)
            mine = torch.stack([amax(part, Granularity.TENSOR).view(()) for part in parts])
            is_split = self._is_split
        elif self._grain is Granularity.CHANNEL and self._is_row_split:
            mine, is_split = amax(weight, Granularity.CHANNEL), True
        else:
            return None
        if is_split:
            maximum = torch.distributed.ReduceOp.MAX
            torch.distributed.all_reduce(mine, op=maximum, group=get_tp_group().device_group)
        if self._grain is Granularity.TENSOR:
            mine = mine.repeat_interleave(torch.tensor(self._parts, device=mine.device))
        return mine


def _clamped_swiglu(h13: Tensor) -> Tensor:
    """gpt-oss's gate: [S, 2 * I], gate then up -> [S, I]; vLLM calls it swigluoai."""
    gate, up = h13.chunk(2, dim=-1)
    gate = gate.clamp(max=_SWIGLU_LIMIT)
    up = up.clamp(min=-_SWIGLU_LIMIT, max=_SWIGLU_LIMIT)
    return (up + 1) * gate * torch.sigmoid(gate * _SWIGLU_ALPHA)


def _activation(layer: RoutedExperts, name: str) -> tuple[str | None, Gate | None]:
    """A name in `ACTIVATIONS`, or a gate.

    Raises:
        ModelError: vLLM's is neither.
    """
    value: str = layer.activation.value
    ours = value.removesuffix("_no_mul")
    reason = "" if ours in (*ACTIVATIONS, "swigluoai") else f"its activation is {value}"
    if layer.apply_router_weight_on_input:
        reason = "the router's weights apply to its input"
    if reason:
        raise ModelError(
            f"{name}: {reason}, which moeq's plugin does not do",
            hint="run the model in moeq's transformers engine, or leave the layer to vLLM:"
            f" ignore=[{name!r}]",
        )
    return (None, _clamped_swiglu) if ours == "swigluoai" else (ours, None)


def _local_experts(expert_map: Tensor | None) -> list[int] | None:
    """Global ids in the order of this rank's slots."""
    if expert_map is None:
        return None
    slots: list[int] = expert_map.tolist()
    held = {slot: expert for expert, slot in enumerate(slots) if slot >= 0}
    return [held[slot] for slot in sorted(held)]


def _fill(layer: nn.Module) -> None:
    """Random codes for `--load-format dummy`, the same on every rank and machine."""
    names = [f"{weight}_{kind}" for weight in ("w13", "w2") for kind in ("codes", "scale")]
    for name in names:
        tensor = layer.get_parameter(name).data
        if name.endswith("_scale"):
            tensor.fill_(1e-4)
        elif tensor.dtype == torch.int8:
            tensor.random_(-127, 128)
        elif tensor.dtype == torch.uint8:
            tensor.random_(0, 256)
            groups = layer.get_parameter(name.replace("codes", "group_scale")).data
            groups.view(torch.uint8).fill_(0x58 if groups.dtype == torch.float8_e4m3fn else 131)
        else:
            tensor.copy_(torch.empty_like(tensor, dtype=torch.bfloat16).normal_(std=50))
