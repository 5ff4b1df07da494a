"""Triton's interpreter with casts that round as GPUs do.

In Triton 3.6 it truncates fp32 to bf16, loses the carry when it rounds to fp8, turns integers into
bf16 by their bits, multiplies bf16 matrices as if they were integers, and rounds twice in a fused
multiply-add. Here PyTorch's casts take their place: round half to even, and fp8 saturated, which is
what the hardware's conversion does (PyTorch's gives NaN).
"""

from __future__ import annotations

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

_DTYPES = {
    tl.float64: (torch.float64, np.float64),
    tl.float32: (torch.float32, np.float32),
    tl.float16: (torch.float16, np.float16),
    tl.bfloat16: (torch.bfloat16, np.uint16),
    tl.float8e4nv: (torch.float8_e4m3fn, np.uint8),
}
_BITS = {2: torch.int16, 1: torch.int8}


def _convert_float(data: np.ndarray, source: tl.dtype, target: tl.dtype, _: object) -> np.ndarray:
    values = _to_torch(data, source)
    if target == tl.float8e4nv:
        values = values.float().clamp(-448, 448)
    return _to_numpy(values, target)


def _to_torch(data: np.ndarray, dtype: tl.dtype) -> torch.Tensor:
    raw = torch.from_numpy(np.ascontiguousarray(data).copy().view(np.uint8).reshape(-1))
    return raw.view(_DTYPES[dtype][0]).reshape(data.shape)


def _to_numpy(values: torch.Tensor, dtype: tl.dtype) -> np.ndarray:
    torch_dtype, numpy_dtype = _DTYPES[dtype]
    raw = values.to(torch_dtype).contiguous().reshape(-1).view(torch.uint8).numpy()
    return raw.view(numpy_dtype).reshape(tuple(values.shape))


def _cast_impl(self, src, dst_type):
    source, target = src.dtype.scalar, dst_type.scalar
    if source in _DTYPES and target in _DTYPES:
        data = _convert_float(src.data, source, target, None)
    elif target == tl.bfloat16:
        data = _to_numpy(torch.from_numpy(src.data.astype(np.float32)), target)
    else:
        data = src.data.astype(interpreter._get_np_dtype(dst_type))
    return interpreter.TensorHandle(data, target)


def _create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
    if a.dtype.scalar.is_floating():
        left, right = (_to_torch(v.data, v.dtype.scalar).float() for v in (a, b))
        product = (left @ right).numpy()
    else:
        product = np.matmul(a.data, b.data, dtype=d.data.dtype)
    return interpreter.TensorHandle(product + d.data, d.dtype.scalar)


def _create_fma(self, x, y, z):
    exact = x.data.astype(np.float64) * y.data.astype(np.float64)
    return interpreter.TensorHandle((exact + z.data).astype(np.float32), z.dtype.scalar)


def _binary(function):
    return lambda self, left, right: self.binary_op(left, right, function)


_patch_lang_tensor = interpreter._patch_lang_tensor


def _patch_tensor(tensor, scope) -> None:
    _patch_lang_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())


def repair() -> None:
    """Replace what is wrong; for the whole process. (Also: NumPy 2.4 has no int() of an array.)"""
    interpreter._patch_lang_tensor = _patch_tensor
    interpreter._convert_float = _convert_float
    interpreter.InterpreterBuilder.cast_impl = _cast_impl
    # As the hardware's: NaN loses where the kernel does not ask for it
    for name, numpy_function in (("create_maxnumf", np.fmax), ("create_minnumf", np.fmin)):
        setattr(interpreter.InterpreterBuilder, name, _binary(numpy_function))
    interpreter.InterpreterBuilder.create_fma = _create_fma
    interpreter.InterpreterBuilder.create_dot = _create_dot
