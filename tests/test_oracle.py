"""Which kernel runs where, and why the others do not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from moeq import oracle
from moeq.errors import BackendError
from moeq.kernels.activations import ACTIVATIONS
from moeq.oracle import BACKENDS, Backend, KernelRequest, backend_named, select_backend
from moeq.schemes import LAYER_KINDS, LayerKind, OnlineQuantScheme

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
EVERY_SCHEME = pytest.mark.parametrize("scheme", OnlineQuantScheme, ids=lambda scheme: scheme.value)
ONE = OnlineQuantScheme.INT8_PER_CHANNEL_WEIGHT_ONLY


def asking(
    scheme: OnlineQuantScheme = ONE,
    *,
    kind: LayerKind = "moe",
    device: str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    activation: str | None = "silu",
) -> KernelRequest:
    return KernelRequest(kind, scheme, torch.device(device), dtype, activation)


@EVERY_SCHEME
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("kind", LAYER_KINDS)
def test_on_a_cpu_the_cpu_kernels_run(
    scheme: OnlineQuantScheme, dtype: torch.dtype, kind: LayerKind
) -> None:
    for activation in (*ACTIVATIONS, None):
        choice = select_backend(asking(scheme, kind=kind, dtype=dtype, activation=activation))
        assert choice.backend.name == "cpu"


@EVERY_SCHEME
def test_the_note_says_where_a_kernel_departs_from_the_scheme(scheme: OnlineQuantScheme) -> None:
    note = select_backend(asking(scheme)).note
    if scheme.weight_dtype == torch.float8_e4m3fn:
        assert "activations stay unquantized" in note
    else:
        assert note == ""
    assert select_backend(asking(scheme), "reference").note == ""


@pytest.mark.parametrize("device", ["cpu", "cuda", "meta"])
@EVERY_SCHEME
def test_the_reference_runs_anywhere_but_only_if_named(
    scheme: OnlineQuantScheme, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = asking(scheme, device=device)
    choice = select_backend(request, "reference")
    assert choice.backend.name == "reference"
    assert choice.rejected == ()
    monkeypatch.setattr(oracle, "BACKENDS", (backend_named("reference"),))
    with pytest.raises(BackendError, match=r"reference: the slow ground truth.*only if named"):
        select_backend(request)


def test_where_nothing_runs_the_error_lists_every_reason() -> None:
    with pytest.raises(BackendError) as caught:
        select_backend(asking(device="meta"))
    message = caught.value.message
    assert message.startswith(
        "no kernel runs int8_per_channel_weight_only (moe, torch.bfloat16, on meta): "
    )
    assert "cpu: runs on the CPU, not on meta" in message
    assert "reference: the slow ground truth of the tests: runs only if named" in message
    for backend in BACKENDS:
        reason = backend.rejects(asking(device="meta"), False)
        assert reason
        assert f"{backend.name}: {reason}" in message
    assert "moeq backends" in caught.value.hint


def test_cuda_weights_do_not_fall_back_to_the_cpu() -> None:
    # Whether a GPU kernel takes them depends on the machine; the CPU's never does.
    request = asking(device="cuda")
    try:
        assert select_backend(request).backend.name not in ("cpu", "reference")
    except BackendError as error:
        for reason in ("cpu: runs on the CPU, not on cuda", "reference: the slow"):
            assert reason in error.message
    with pytest.raises(BackendError, match="cpu: runs on the CPU, not on cuda"):
        select_backend(request, "cpu")


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Pretends that there is one GPU, with a capability and shared memory of a block in KiB."""

    def pretend(capability: tuple[int, int], kib: int = 99) -> None:
        pytest.importorskip("triton")
        from moeq.kernels.triton import plans

        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(plans, "gpu", lambda device: plans.Gpu(capability, kib << 10))
        cached = getattr(plans.arithmetic, "__wrapped__", plans.arithmetic)
        monkeypatch.setattr(plans, "arithmetic", cached)

    return pretend


@EVERY_SCHEME
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("capability", "kib"), [((8, 0), 163), ((8, 9), 99), ((9, 0), 227)])
def test_on_a_gpu_the_triton_kernels_run(
    scheme: OnlineQuantScheme,
    dtype: torch.dtype,
    capability: tuple[int, int],
    kib: int,
    on_a_gpu: Callable[..., None],
) -> None:
    on_a_gpu(capability, kib)
    for kind in LAYER_KINDS:
        choice = select_backend(asking(scheme, kind=kind, device="cuda", dtype=dtype))
        assert choice.backend.name == "triton"
        has_fp8 = capability >= (8, 9) or scheme.weight_dtype != torch.float8_e4m3fn
        assert bool(choice.note) is not has_fp8
        if choice.note:
            assert "no fp8 units at compute capability 8.0" in choice.note


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": torch.float32}, "takes bfloat16 or float16 activations, not torch.float32"),
        ({"device": "cuda:1"}, "cuda:1 is not there: 1 CUDA devices are visible"),
        ({"num_experts": 5000}, "routes to at most 4096 experts, not 5000"),
        ({"width": 70000}, "takes rows of at most 65536 elements, not 70000"),
    ],
)
def test_the_triton_kernels_say_what_they_do_not_take(
    change: dict[str, Any], reason: str, on_a_gpu: Callable[..., None]
) -> None:
    on_a_gpu((9, 0), 227)
    device = torch.device(change.pop("device", "cuda"))
    request = replace(asking(device="cuda"), device=device, **change)
    with pytest.raises(BackendError) as caught:
        select_backend(request)
    assert f"triton: {reason}" in caught.value.message


def test_gpus_that_are_too_old_or_too_small_are_named(on_a_gpu: Callable[..., None]) -> None:
    on_a_gpu((7, 5), 64)
    with pytest.raises(BackendError, match=r"needs compute capability 8.0, cuda has 7.5"):
        select_backend(asking(device="cuda"))
    on_a_gpu((8, 6), 16)
    with pytest.raises(BackendError, match=r"needs \d+ bytes of shared memory .* cuda has 16384"):
        select_backend(asking(device="cuda"))


def test_without_triton_the_reason_is_the_package(
    on_a_gpu: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    on_a_gpu((9, 0), 227)
    monkeypatch.setattr(oracle, "find_spec", lambda name: None)
    with pytest.raises(BackendError, match="needs the package triton"):
        select_backend(asking(device="cuda"))


def test_a_dtype_that_nobody_takes_is_an_error() -> None:
    with pytest.raises(BackendError, match=r"takes bfloat16, float16 or float32 .* torch.float64"):
        select_backend(asking(dtype=torch.float64))


def test_a_named_backend_that_does_not_run_is_an_error_even_where_others_would() -> None:
    with pytest.raises(BackendError) as caught:
        select_backend(asking(dtype=torch.float64), "cpu")
    assert "cpu: takes bfloat16" in caught.value.message
    assert "reference" not in caught.value.message


def test_an_unknown_backend_names_those_that_there_are() -> None:
    for ask in (backend_named, lambda name: select_backend(asking(), name)):
        with pytest.raises(BackendError) as caught:
            ask("triton-warp")
        assert caught.value.message == "unknown kernel backend 'triton-warp'"
        assert caught.value.hint == "known: " + ", ".join(b.name for b in BACKENDS)


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.name)
def test_backends_are_found_by_a_name_of_their_own(backend: Backend) -> None:
    assert backend_named(backend.name) is backend
    assert [b.name for b in BACKENDS].count(backend.name) == 1


@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_a_backend_has_the_three_kernels(name: str) -> None:
    kernels = backend_named(name).kernels()
    for kernel in ("fused_experts", "expert_linear", "linear"):
        assert callable(getattr(kernels, kernel))


def test_the_first_that_takes_a_request_wins_and_those_before_it_say_why(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[tuple[str, bool]] = []

    def backend(name: str, reason: str) -> Backend:
        def rejects(request: KernelRequest, named: bool) -> str:
            asked.append((name, named))
            return reason

        return Backend(name, "nowhere", rejects, lambda request: f"note of {name}")

    table = (backend("a", "too small"), backend("b", ""), backend("c", ""))
    monkeypatch.setattr(oracle, "BACKENDS", table)
    choice = select_backend(asking())
    assert (choice.backend.name, choice.note) == ("b", "note of b")
    assert choice.rejected == (("a", "too small"),)
    assert asked == [("a", False), ("b", False)]
    asked.clear()
    assert select_backend(asking(), "c").backend.name == "c"
    assert asked == [("c", True)]  # nobody else is even asked
