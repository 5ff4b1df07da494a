"""Bytes of a load, before it begins: what its stream takes, what stays, what is mapped."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from moeq.checkpoint.headers import TensorSpec
from moeq.engines.hf_routes import Decision
from moeq.engines.hf_stream import LayerStream
from moeq.engines.hf_structure import expert_matrices
from moeq.plan import LayerPlan, LoadPlan


def load_plan(
    model: nn.Module, decision: Decision, specs: Mapping[str, TensorSpec], layers: LayerStream
) -> LoadPlan:
    """Bytes of a load that quantizes."""
    state = model.state_dict()
    mapped = {
        name: spec
        for name, spec in decision.routes.plain.items()
        if layers.maps_rest and name not in layers.kept and spec.dtype == state[name].dtype
    }
    return _plan(
        model,
        decision.routes.plans,
        specs,
        decision.kept,
        decision.routes.dropped,
        window_bytes=layers.window_bytes,
        host_bytes=layers.host_bytes,
        mapped_bytes=sum(spec.nbytes for spec in mapped.values()),
        decoded_bytes=sum(spec.held_bytes - spec.nbytes for spec in decision.routes.decoded),
    )


def saved_plan(
    model: nn.Module,
    plans: tuple[LayerPlan, ...],
    specs: Mapping[str, TensorSpec],
    kept: dict[str, str],
) -> LoadPlan:
    """Bytes of a load of what moeq saved: transformers maps or copies it."""
    return _plan(
        model,
        plans,
        specs,
        kept,
        (),
        window_bytes=0,
        host_bytes=0,
        mapped_bytes=0,
        decoded_bytes=0,
    )


def _plan(
    model: nn.Module,
    plans: tuple[LayerPlan, ...],
    specs: Mapping[str, TensorSpec],
    kept: dict[str, str],
    dropped: tuple[str, ...],
    *,
    window_bytes: int,
    host_bytes: int,
    mapped_bytes: int,
    decoded_bytes: int,
) -> LoadPlan:
    unquantized = [
        matrix
        for name, module in model.named_modules()
        if name in kept and not isinstance(module, nn.Linear)
        for matrix in expert_matrices(module)
    ]
    skipped = sum(plan.skipped_bytes for plan in plans)
    return LoadPlan(
        plans,
        checkpoint_bytes=sum(spec.nbytes for spec in specs.values()) - skipped,
        unquantized_bytes=sum(p.numel() * p.element_size() for p in unquantized),
        unquantized_weights=sum(p.numel() for p in unquantized),
        kept=kept,
        dropped=dropped,
        window_bytes=window_bytes,
        host_bytes=host_bytes,
        mapped_bytes=mapped_bytes,
        decoded_bytes=decoded_bytes,
    )
