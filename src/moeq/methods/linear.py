"""`OnlineLinearMethod`: the same life for the weight of an `nn.Linear`, under any scheme that
covers linears. The layer gets `weight_codes`, `weight_scale` and, where the scheme has groups,
`weight_group_scale`; its bias stays as it is."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moeq import ops
from moeq.errors import CheckpointError
from moeq.methods.matrices import Place, quantize_matrices
from moeq.methods.parameters import (
    align,
    arrange,
    check_scales,
    check_weight_dtype,
    parameter,
    register_matrices,
    restore,
    storage,
    stored,
)
from moeq.oracle import Choice, KernelRequest, select_backend
from moeq.quantize import dequantize
from moeq.schemes import OnlineQuantScheme
from moeq.span import Span


class OnlineLinearMethod:
    """One instance per layer."""

    def __init__(self, scheme: OnlineQuantScheme, *, backend: str | None = None) -> None:
        assert scheme.covers("linear"), scheme
        self.scheme = scheme
        self.backend = backend
        self.choice: Choice | None = None
        self._loaded = False

    def create_weights(
        self, layer: nn.Module, *, in_features: int, out_features: int, dtype: torch.dtype
    ) -> None:
        """Register codes and scales of [out, in] on the meta device; `dtype`: activations'."""
        self._dtype = dtype
        self._width = in_features
        shape = (out_features, in_features)
        register_matrices(layer, "weight", shape, self.scheme)

    def load(
        self,
        layer: nn.Module,
        weight: Tensor,
        name: str,
        device: torch.device,
        *,
        amax: Tensor | None = None,
    ) -> None:
        """Quantize a weight [out, in] into final storage on `device`.

        Args:
            layer: that `create_weights` has seen.
            weight: fp16, bf16 or fp32.
            name: of the tensor, for messages.
            device: of the codes.
            amax: of what shares a scale, where the weight is a part of that.

        Raises:
            CheckpointError: misshapen, of a wrong dtype, or here before.
            NonFiniteError: NaN or Inf among the values.
        """
        if self._loaded:
            raise CheckpointError(f"{name}: arrived before")
        shape = (parameter(layer, "weight_codes").shape[0], self._width)
        if tuple(weight.shape) != shape:
            raise CheckpointError(f"{name}: shape {list(weight.shape)}, expected {list(shape)}")
        check_weight_dtype(weight, name)
        if parameter(layer, "weight_codes").is_meta:
            for own in self._own(layer):
                empty = torch.empty_like(parameter(layer, own), device=device)
                setattr(layer, own, nn.Parameter(empty, requires_grad=False))
        place = Place(Span.of(weight), 0, 0, name, amax)
        quantize_matrices(storage(layer, "weight"), [place], self.scheme.granularity)
        self._loaded = True

    def _own(self, layer: nn.Module) -> list[str]:
        kinds = ("codes", "scale", "group_scale")
        return [name for kind in kinds if (name := f"weight_{kind}") in layer._parameters]

    def expect_all(self) -> None:
        """The weight is to arrive anew."""
        self._loaded = False

    def expect_nothing(self) -> None:
        """What has not arrived will not."""
        self._loaded = True

    def check_arrived(self, name: str) -> None:
        """That the weight of the layer called `name` is there.

        Raises:
            CheckpointError: it never arrived.
        """
        if not self._loaded:
            raise CheckpointError(f"{name}: its weight never arrived")

    def select_backend(self, device: torch.device) -> Choice:
        """The kernel that would run: to ask before anything is loaded.

        Raises:
            BackendError: none does.
        """
        request = KernelRequest(
            "linear", self.scheme, device, self._dtype, num_experts=1, width=self._width
        )
        return select_backend(request, self.backend)

    def mark_loaded(self, layer: nn.Module, name: str) -> None:
        """The weight arrived already quantized, in a checkpoint that moeq saved.

        Raises:
            CheckpointError: scales of the layer called `name` that no quantizer makes.
        """
        check_scales(layer, "weight", name)
        self._loaded = True
        align(parameter(layer, "weight_codes"))

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Check that the weight arrived and choose the kernel; later calls do nothing."""
        if self.choice is not None:
            return
        self.check_arrived("a linear layer")
        self.choice = self.select_backend(parameter(layer, "weight_codes").device)
        self.arrange(layer)

    def arrange(self, layer: nn.Module) -> None:
        """As `OnlineMoEMethodBase.arrange`."""
        if self.choice is not None and self.choice.backend.name == "cpu":
            arrange(layer, "weight", self._width)

    def restore(self, layer: nn.Module) -> None:
        """As `OnlineMoEMethodBase.restore`."""
        restore(layer, "weight")

    def dequantized(self, layer: nn.Module, dtype: torch.dtype | None = None) -> Tensor:
        """The weight [N, K] as it acts, in the activations' dtype or another."""
        codes, scale, groups = stored(layer, "weight")
        return dequantize(
            codes,
            scale,
            self.scheme.granularity,
            dtype=dtype or self._dtype,
            group_scale=groups,
            columns=self._width,
        )

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None) -> Tensor:
        """x [..., K] -> [..., N] in the dtype of x, plus the bias [N]."""
        assert self.choice is not None, "apply before process_weights_after_loading"
        out: Tensor = ops.linear(
            x,
            parameter(layer, "weight_codes"),
            parameter(layer, "weight_scale"),
            layer._parameters.get("weight_group_scale"),
            bias,
            self.scheme.value,
            self.choice.backend.name,
        )
        return out
