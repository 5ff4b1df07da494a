"""`OnlineLinearMethod`: the same life for the weight of an `nn.Linear`, under any scheme that
covers linears. The layer gets `weight_codes` [N, K] and `weight_scale`; its bias stays as it is."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moeq import ops
from moeq.errors import CheckpointError
from moeq.experts import scale_shape
from moeq.methods.matrices import Place, Storage, quantize_matrices
from moeq.methods.parameters import align, check_scale, check_weight_dtype, parameter, register_meta
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
        """Register codes [out, in] and fp32 scales on the meta device; `dtype`: activations'."""
        self._dtype = dtype
        self._width = in_features
        shape = (out_features, in_features)
        register_meta(layer, "weight_codes", shape, self.scheme.weight_dtype)
        grid = scale_shape(self.scheme.granularity, shape)
        register_meta(layer, "weight_scale", grid, torch.float32)

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
        shape = tuple(parameter(layer, "weight_codes").shape)
        if tuple(weight.shape) != shape:
            raise CheckpointError(f"{name}: shape {list(weight.shape)}, expected {list(shape)}")
        check_weight_dtype(weight, name)
        if parameter(layer, "weight_codes").is_meta:
            for own in ("weight_codes", "weight_scale"):
                empty = torch.empty_like(parameter(layer, own), device=device)
                setattr(layer, own, nn.Parameter(empty, requires_grad=False))
        codes, scale = parameter(layer, "weight_codes"), parameter(layer, "weight_scale")
        place = Place(Span.of(weight), 0, 0, name, amax)
        quantize_matrices(Storage(codes.data, scale.data), [place], self.scheme.granularity)
        self._loaded = True

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
        check_scale(parameter(layer, "weight_scale"), f"{name}.weight_scale")
        self._loaded = True
        align(parameter(layer, "weight_codes"))

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Check that the weight arrived and choose the kernel; later calls do nothing."""
        if self.choice is not None:
            return
        self.check_arrived("a linear layer")
        self.choice = self.select_backend(parameter(layer, "weight_codes").device)

    def dequantized(self, layer: nn.Module) -> Tensor:
        """The weight [N, K] as it acts, in the activations' dtype."""
        codes, scale = parameter(layer, "weight_codes"), parameter(layer, "weight_scale")
        return dequantize(codes, scale, self.scheme.granularity, dtype=self._dtype)

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None) -> Tensor:
        """x [..., K] -> [..., N] in the dtype of x, plus the bias [N]."""
        assert self.choice is not None, "apply before process_weights_after_loading"
        out: Tensor = ops.linear(
            x,
            parameter(layer, "weight_codes"),
            parameter(layer, "weight_scale"),
            bias,
            self.scheme.value,
            self.choice.backend.name,
        )
        return out
