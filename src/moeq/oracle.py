"""Which kernel runs here: a literal table, a predicate per row, and the reason for every rejection.

A predicate returns "" for yes, or why not. Choosing returns the winner together with everything
that was turned down; failing prints it all. A backend that the user named is used or it is an
error. Nothing is detected at import.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
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
    """

    kind: LayerKind
    scheme: OnlineQuantScheme
    device: torch.device
    dtype: torch.dtype
    activation: str | None = None


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


def _cpu_rejects(request: KernelRequest, named: bool) -> str:
    if request.device.type != "cpu":
        return f"runs on the CPU, not on {request.device.type}; GPU kernels are not there yet"
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
        hint="`moeq backends` prints what runs where",
    )
