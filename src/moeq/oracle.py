"""Which kernel runs here: a literal table, a predicate per row, and the reason for every rejection.

A predicate returns "" for yes, or why not. Choosing returns the winner together with everything
that was turned down; failing prints it all. A backend that the user named is used or it is an
error. Nothing is detected at import.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import torch

from moeq.errors import BackendError
from moeq.schemes import LayerKind, OnlineQuantScheme


@dataclass(frozen=True)
class KernelRequest:
    """What a kernel would have to do.

    Attributes:
        kind: "moe" or "linear".
        scheme: what the codes mean.
        device: where weights and activations are.
        dtype: of the activations.
        activation: a key of `moeq.kernels.activations.ACTIVATIONS`; None where the model's own
            gate runs between the two halves of the layer, and for linears.
        num_experts: E held on the device; 0 where the question is a general one.
        width: the longest row of a weight, K; likewise.
    """

    kind: LayerKind
    scheme: OnlineQuantScheme
    device: torch.device
    dtype: torch.dtype
    activation: str | None = None
    num_experts: int = 0
    width: int = 0


@dataclass(frozen=True)
class Backend:
    """A row of the table. `module` holds `fused_experts`, `expert_linear` and `linear`."""

    name: str
    module: str
    rejects: Callable[[KernelRequest, bool], str]
    note: Callable[[KernelRequest], str]

    def kernels(self) -> ModuleType:
        """The functions, imported on first use."""
        return import_module(self.module)


@dataclass(frozen=True)
class Choice:
    """The backend that runs, what it does differently from the scheme's letter, and who lost."""

    backend: Backend
    note: str
    rejected: tuple[tuple[str, str], ...]


TRITON_CAPABILITY = (8, 0)
"""First compute capability with bf16 and asynchronous copies: Ampere."""

TRITON_EXPERTS = 4096
"""Experts of one layer that the routing kernel can count."""

TRITON_WIDTH = 1 << 16
"""Elements of a row that one program quantizes."""


def _triton_rejects(request: KernelRequest, named: bool) -> str:
    if request.device.type != "cuda":
        return f"runs on NVIDIA GPUs, not on {request.device.type}"
    if torch.version.hip is not None:
        return "runs on NVIDIA GPUs, and this PyTorch is built for AMD's"
    visible = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if (request.device.index or 0) >= visible:
        return f"{request.device} is not there: {visible} CUDA devices are visible"
    if find_spec("triton") is None:
        return "needs the package triton, which comes with PyTorch's CUDA builds"
    if request.dtype not in (torch.bfloat16, torch.float16):
        return f"takes bfloat16 or float16 activations, not {request.dtype}"
    if request.num_experts > TRITON_EXPERTS:
        return f"routes to at most {TRITON_EXPERTS} experts, not {request.num_experts}"
    if request.width > TRITON_WIDTH:
        return f"takes rows of at most {TRITON_WIDTH} elements, not {request.width}"
    from moeq.kernels.triton import plans

    device = _indexed(request.device)
    gpu = plans.gpu(device)
    if gpu.capability < TRITON_CAPABILITY:
        return (
            f"needs compute capability {_dotted(TRITON_CAPABILITY)},"
            f" {request.device} has {_dotted(gpu.capability)}"
        )
    least = plans.least_shared_memory(
        request.scheme, plans.arithmetic(device, request.scheme), request.dtype
    )
    if gpu.shared_memory < least:
        return (
            f"needs {least} bytes of shared memory per block,"
            f" {request.device} has {gpu.shared_memory}"
        )
    return ""


def _triton_note(request: KernelRequest) -> str:
    from moeq.kernels.triton import plans

    device = _indexed(request.device)
    if plans.arithmetic(device, request.scheme).fp8_bits:
        return (
            f"no fp8 units at compute capability {_dotted(plans.gpu(device).capability)}"
            f" (they begin at {_dotted(plans.FP8_CAPABILITY)}), so activations stay unquantized"
        )
    return ""


def _indexed(device: torch.device) -> torch.device:
    """ "cuda" is the current device, which may be another one tomorrow."""
    index: int | None = device.index
    return torch.device("cuda", torch.cuda.current_device() if index is None else index)


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))


def _cpu_rejects(request: KernelRequest, named: bool) -> str:
    if request.device.type != "cpu":
        return f"runs on the CPU, not on {request.device.type}"
    if request.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"takes bfloat16, float16 or float32 activations, not {request.dtype}"
    return ""


def _cpu_note(request: KernelRequest) -> str:
    if request.scheme.weight_dtype == torch.float8_e4m3fn:
        return "fp8 on a CPU: no fp8 units, so activations stay unquantized"
    return ""


def _reference_rejects(request: KernelRequest, named: bool) -> str:
    return "" if named else "the slow ground truth of the tests: runs only if named"


def _no_note(request: KernelRequest) -> str:
    return ""


BACKENDS = (
    Backend("triton", "moeq.kernels.triton", _triton_rejects, _triton_note),
    Backend("cpu", "moeq.kernels.cpu", _cpu_rejects, _cpu_note),
    Backend("reference", "moeq.kernels.reference", _reference_rejects, _no_note),
)
"""In order of preference."""


def backend_named(name: str) -> Backend:
    """The row called `name`. Raises `BackendError` naming the rows there are."""
    for backend in BACKENDS:
        if backend.name == name:
            return backend
    known = ", ".join(backend.name for backend in BACKENDS)
    raise BackendError(f"unknown kernel backend {name!r}", hint=f"known: {known}")


def select_backend(request: KernelRequest, prefer: str | None = None) -> Choice:
    """The first backend that takes the request, or the one that the user named.

    Raises:
        BackendError: nobody takes it, or the named one does not; with every reason.
    """
    candidates = BACKENDS if prefer is None else (backend_named(prefer),)
    rejected: list[tuple[str, str]] = []
    for backend in candidates:
        reason = backend.rejects(request, prefer is not None)
        if not reason:
            return Choice(backend, backend.note(request), tuple(rejected))
        rejected.append((backend.name, reason))
    raise BackendError(
        f"no kernel runs {request.scheme.value} ({request.kind}, {request.dtype},"
        f" on {request.device.type}): "
        + "; ".join(f"{name}: {reason}" for name, reason in rejected),
        hint=f"`moeq backends --device {request.device.type}` says what runs there",
    )
