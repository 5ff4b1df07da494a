"""Compiles what a layer would launch on a GPU, without one; run as a program, prints JSON.

    python -m tests.kernels.triton.compiling CAPABILITY SHARED_MEMORY SCHEME...

The launchers of `moeq.kernels.triton` run on tensors of the CPU, with kernels that compile for the
target where they would launch: to machine code, as on the real device. Tiny matrices do, because
sizes are no constants of a kernel, only what divides them.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

from moeq.experts import code_columns, group_shape, scale_shape
from moeq.kernels import triton as backend
from moeq.kernels.triton import gemm, gemv, layer, plans, routing, rows, weights
from moeq.quantize import quantize_activations
from moeq.schemes import OnlineQuantScheme
from moeq.span import Span
from tests.kernels.layers import random_weights, route

_TYPES = {
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float8_e4m3fn: "*fp8e4nv",
}

_LAUNCHED = {
    gemm: ("grouped_gemm",),
    gemv: ("up", "down"),
    rows: ("quantize_rows", "combine"),
    routing: ("_count", "_add_up", "_place"),
    weights: ("_rows", "_blocks", "_amax", "_encode", "_groups"),
}

_OPTIONS = ("num_warps", "num_stages", "maxnreg", "launch_pdl")


class Compiled:
    """A kernel that compiles where it would launch."""

    def __init__(self, kernel: Any, target: GPUTarget, found: dict[str, int]) -> None:
        self.kernel, self.target, self.found = kernel, target, found

    def __getitem__(self, grid: Any) -> Any:
        return self._launch

    def _launch(self, *args: Any, **kwargs: Any) -> None:
        options = {name: kwargs.pop(name) for name in _OPTIONS if name in kwargs}
        values = dict(zip(self.kernel.arg_names, args)) | kwargs
        signature: dict[str, str] = {}
        constants: dict[tuple[int, ...], Any] = {}
        attributes: dict[tuple[int, ...], Any] = {}
        for index, parameter in enumerate(self.kernel.params):
            value = values[parameter.name]
            if parameter.is_constexpr:
                signature[parameter.name] = "constexpr"
                constants[(index,)] = value
            elif isinstance(value, TensorDescriptor):
                box = ", ".join(map(str, value.block_shape))
                signature[parameter.name] = f"tensordesc<{_TYPES[value.base.dtype][1:]}[{box}]>"
            elif isinstance(value, torch.Tensor):
                signature[parameter.name] = _TYPES[value.dtype]
                attributes[(index,)] = [["tt.divisibility", 16]]
            else:
                signature[parameter.name] = "i32"
                if value % 16 == 0:
                    attributes[(index,)] = [["tt.divisibility", 16]]
        shown = {self.kernel.arg_names[index]: value for (index,), value in constants.items()}
        key = f"{self.kernel.__name__} {shown} {signature} {sorted(attributes)} {options}"
        if key not in self.found:
            source = ASTSource(self.kernel, signature, constants, attributes)
            made = triton.compile(source, target=self.target, options=options)
            self.found[key] = made.metadata.shared


def main(capability: str, shared_memory: str, *schemes: str) -> None:
    target = GPUTarget("cuda", int(capability), 32)
    gpu = plans.Gpu((int(capability) // 10, int(capability) % 10), int(shared_memory))
    plans.gpu = weights.gpu = lambda device: gpu
    found: dict[str, int] = {}
    for module, names in _LAUNCHED.items():
        for name in names:
            setattr(module, name, Compiled(getattr(module, name), target, found))
    launch = layer.quantize_rows

    def quantize_rows(x: torch.Tensor, scheme: OnlineQuantScheme, **options: Any) -> Any:
        launch(x, scheme, **options)
        return quantize_activations(x, scheme)  # the launch above writes nothing

    layer.quantize_rows = quantize_rows
    for name in schemes:
        scheme = OnlineQuantScheme(name)
        made = random_weights(scheme, 8, 256, 256)
        family = plans._family(scheme, plans.arithmetic(torch.device("cpu"), scheme))
        for row in plans._tilings()[family]["gemm"]:
            t = max(8, int(min(row["rows"], 900) * 4))
            ids, factors = route(t, 2, 8)
            backend.fused_experts(torch.zeros(t, 256).bfloat16(), ids, factors, made, "silu")
        ids, factors = route(1, 2, 8)
        backend.fused_experts(torch.zeros(1, 256).bfloat16(), ids, factors, made, "silu")
        x = torch.zeros(1, 1, 256).bfloat16()
        backend.expert_linear(x, ids, made.w13, made.w13_scale, made.w13_group, None, scheme, 2)
        if scheme.covers("linear"):
            group = None if made.w2_group is None else made.w2_group[0]
            backend.linear(x, made.w2[0], made.w2_scale[0], group, None, scheme)
        if weights.knows(made.w2.device, made.w2.dtype):
            for wide in (256, 1 << 15):
                codes = torch.empty(256, code_columns(scheme, wide), dtype=scheme.weight_dtype)
                scales = torch.empty(scale_shape(scheme.granularity, (256, wide)))
                matrix = torch.zeros(256, wide, dtype=torch.bfloat16)
                grid = group_shape(scheme, (256, wide))
                groups = None if grid is None else torch.empty(grid, dtype=scheme.group_dtype)
                weights.quantize_weights(
                    [Span.of(matrix)], codes, scales, [0], [0], scheme.granularity, groups, [0]
                )
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
