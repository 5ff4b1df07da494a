"""One matrix into its final storage: the numerics of `moeq.quantize`, wherever the storage is.

On a CUDA device the fused kernels of `moeq.kernels.triton.weights` do it, where they know the
codes: the same bytes.
"""

from __future__ import annotations

from torch import Tensor

from moeq.quantize import amax, check_finite, quantize, scale_from_amax
from moeq.schemes import Granularity


def quantize_matrix(
    weight: Tensor, granularity: Granularity, codes: Tensor, scale: Tensor, name: str
) -> None:
    """Scale and codes of a weight.

    Args:
        weight: [N, K], fp16, bf16 or fp32, on any device.
        granularity: what shares a scale.
        codes: [N, K], written; its dtype and device decide.
        scale: fp32, `scale_shape(granularity, weight.shape)`, written.
        name: of the tensor in the checkpoint, for messages.

    Raises:
        NonFiniteError: NaN or Inf among the values.
    """
    weight = weight.to(codes.device)
    if _has_kernel(codes):
        from moeq.kernels.triton.weights import quantize_weight

        quantize_weight(weight, granularity, codes, scale)
        check_finite(weight, scale, name)  # a scale is finite where its amax is
        return
    group_amax = amax(weight, granularity)
    check_finite(weight, group_amax, name)
    scale.copy_(scale_from_amax(group_amax, codes.dtype))
    quantize(weight, scale, codes.dtype, granularity, out=codes)


def quantize_under(weight: Tensor, group_amax: Tensor, codes: Tensor, scale: Tensor) -> None:
    """The same for a matrix with one scale, under an amax [] that it shares with others; both on
    the device of the codes."""
    if _has_kernel(codes):
        from moeq.kernels.triton.weights import encode_weight

        encode_weight(weight, group_amax, codes, scale)
        return
    scale.copy_(scale_from_amax(group_amax, codes.dtype))
    quantize(weight, scale, codes.dtype, Granularity.TENSOR, out=codes)


def matrix_amax(weight: Tensor, name: str) -> Tensor:
    """Largest magnitude [] of a weight [N, K].

    Raises:
        NonFiniteError: NaN or Inf among the values.
    """
    found = amax(weight, Granularity.TENSOR)
    check_finite(weight, found, name)
    return found


def _has_kernel(codes: Tensor) -> bool:
    """Whether the kernels can write such codes where they are; else PyTorch's operators do it."""
    if not codes.is_cuda:
        return False
    from moeq.kernels.triton.weights import knows

    return bool(knows(codes.device, codes.dtype))
