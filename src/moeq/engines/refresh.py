"""New weights for a model that is loaded and quantized, in place: for RL, where they change often.

    for step in training:
        moeq.refresh(model, trainer.named_tensors())

Names are those of the original checkpoint, or of the model's own fused parameters; order and
grouping do not matter. Codes, scales and everything else are written where they are, so what was
captured into a CUDA graph stays valid, and the result is the bytes of a fresh load. At most
`_BATCH` bytes are on their way at a time, however many tensors come.
"""

from __future__ import annotations

import math
import time
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moeq.checkpoint.headers import FileStamp, TensorSpec
from moeq.config import OnlineQuantizationConfig
from moeq.engines.hf_modules import order_of_files
from moeq.engines.hf_router import Router, fed_by, source_of
from moeq.engines.hf_routes import check_rest, original_names
from moeq.engines.hf_stream import Arrival, Method, arrivals_of
from moeq.engines.hf_structure import Target, find_targets
from moeq.errors import ModelError, MoeqError, RefreshError
from moeq.methods.base import OnlineMoEMethodBase
from moeq.methods.linear import OnlineLinearMethod
from moeq.methods.parameters import finite_scales
from moeq.plan import Source, check_source
from moeq.span import Span

_BATCH = 1 << 30
"""Bytes that are collected before they are quantized: launches take longer than what they do."""

_HERE = Path("refresh")
"""Stands for a file in messages: these tensors come from none."""


@dataclass(frozen=True)
class RefreshReport:
    """What one refresh did.

    Attributes:
        tensors: that arrived.
        nbytes: of them.
        seconds: from the first to the last.
    """

    tensors: int
    nbytes: int
    seconds: float


def refresh(
    model: Any, tensors: Iterable[tuple[str, Tensor]] | Mapping[str, Tensor]
) -> RefreshReport:
    """Give a quantized model new weights, in place.

    Args:
        model: that moeq loaded.
        tensors: (name in the original checkpoint, tensor), fp16, bf16 or fp32 on any device; every
            tensor of the checkpoint once, in any order. They keep their values until this returns:
            several are quantized at once. Ranks that share the model are each given all of them
            and take their own.

    Raises:
        RefreshError: a tensor is missing, twice, unknown or misshapen, or not finite and to be
            quantized. What arrived before it is in place, the rest is as it was: the model runs,
            on a mixture that the message describes. A whole refresh mends it.
        ModelError: moeq did not load this model, or cannot refresh its kind.
    """
    pairs = tensors.items() if isinstance(tensors, Mapping) else tensors
    with order_of_files(model):
        return _Refresh(_table_of(model), model).run(pairs)


@dataclass(frozen=True)
class _Slot:
    """Where one tensor goes: a quantized layer, or a parameter that is kept.

    Attributes:
        shape, dtype: of the tensor.
        nbytes: of it.
        fed: parameters of the original model that it is part of.
        name: of the layer, or of the parameter.
        source: what it is to the layer; None for what is kept.
        projection: which one of which expert it is, just as the layer has it; None where it is
            more, or less.
    """

    shape: torch.Size
    dtype: torch.dtype
    nbytes: int
    fed: tuple[str, ...]
    name: str
    source: Source | None
    projection: tuple[int, Any] | None = None


class _Table:
    """Slots by name, for one model; made once, because matching names takes longer than copying."""

    def __init__(self, model: Any) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping

        config = getattr(model, "hf_quantizer", None)
        config = getattr(config, "quantization_config", None)
        if not isinstance(config, OnlineQuantizationConfig):
            raise ModelError("the model was not quantized by moeq while it loaded")
        plain = type(model.config).from_dict(model.config.to_dict())
        if hasattr(plain, "quantization_config"):
            del plain.quantization_config
        with torch.device("meta"):
            self.original = type(model)._from_config(plain, dtype=model.dtype)
        targets, _ = find_targets(self.original, config)
        self._targets: dict[str, tuple[Target, str]] = {
            f"{target.shape.name}.{name}": (target, name)
            for target in targets
            for name in original_names(target)
        }
        self.layers = {target.shape.name: target for target in targets}
        self._router = Router(self.original, get_model_conversion_mapping(self.original))
        self._slots: dict[str, _Slot] = {}

    def slot(self, name: str, tensor: Tensor) -> _Slot:
        slot = self._slots.get(name)
        if slot is None or slot.shape != tensor.shape or slot.dtype != tensor.dtype:
            slot = self._slots[name] = self._find(name, tensor)
        return slot

    def _find(self, name: str, tensor: Tensor) -> _Slot:
        shape = tuple(tensor.shape)
        spec = TensorSpec(name, tensor.dtype, shape, _HERE, 0, tensor.nbytes, FileStamp(0, 0, 0))
        route, converter = self._router.route(spec)
        fed = tuple(fed_by(route, converter))
        like = tensor.shape, tensor.dtype, tensor.nbytes, fed
        for parameter in fed:
            if parameter in self._targets:
                target, what = self._targets[parameter]
                source = source_of(route, converter, target.module, target.shape, what)
                check_source(target.shape, source)
                is_projection = not (source.is_bias or source.transposed)
                is_projection = is_projection and source.part != "gate_up"
                projection = None
                if is_projection and source.expert is not None:
                    projection = source.expert, source.part
                return _Slot(*like, target.shape.name, source, projection)
        if not self._router.knows(route.parameter):
            raise RefreshError(f"{name!r} is no tensor of this model's checkpoint")
        if converter is not None:
            raise RefreshError(
                f"{name!r}: transformers builds {route.parameter} of several tensors, which moeq"
                " cannot refresh"
            )
        return _Slot(*like, route.parameter, None)


class _Refresh:
    def __init__(self, table: _Table, model: Any) -> None:
        self._table = table
        self._modules = {name: model.get_submodule(name) for name in table.layers}
        self._methods: dict[str, Method] = {
            name: module._moeq_method for name, module in self._modules.items()
        }
        self._state = dict(model.named_parameters(remove_duplicate=False))
        self._state |= dict(model.named_buffers(remove_duplicate=False))
        self._fed: set[str] = set()
        self._seen: set[str] = set()
        self._bytes = 0
        self._batch: dict[str, list[Arrival]] = {}
        self._batched = 0
        self._held: list[tuple[str, Tensor, int]] = []

    @torch.no_grad()
    def run(self, tensors: Iterable[tuple[str, Tensor]]) -> RefreshReport:
        started = time.perf_counter()
        for method in self._methods.values():
            method.expect_all()
        try:
            for name, tensor in tensors:
                self._arrive(name, tensor)
            self._flush()
            self._check_complete()
        except MoeqError as error:
            raise RefreshError(
                f"{error.message}; the model now mixes new and old weights:"
                f" {len(self._seen)} tensors are new",
                hint=error.hint or "refresh it again with every tensor",
            ) from error
        finally:
            for method in self._methods.values():
                method.expect_nothing()
        return RefreshReport(len(self._seen), self._bytes, time.perf_counter() - started)

    def _arrive(self, name: str, tensor: Tensor) -> None:
        if name in self._seen:
            raise RefreshError(f"{name!r} came twice")
        slot = self._table.slot(name, tensor)
        if slot.projection is not None:
            arrival = *slot.projection, Span(tensor.contiguous(), 0, slot.shape), name
            self._collect(slot, (arrival,), tensor)
        elif slot.source is not None:
            self._take(slot, slot.source, tensor)
        else:
            if not self._fed.isdisjoint(slot.fed):
                raise RefreshError(f"{name!r}: {slot.name} came before, under another name")
            self._copy(slot.name, name, tensor)
            self._fed.update(slot.fed)
        self._seen.add(name)
        self._bytes += slot.nbytes

    def _copy(self, parameter: str, name: str, tensor: Tensor) -> None:
        kept = self._state[parameter]
        if kept.shape != tensor.shape:
            raise RefreshError(
                f"{name!r} has shape {list(tensor.shape)}, expected {list(kept.shape)}"
            )
        if kept.is_floating_point() != tensor.is_floating_point():
            raise RefreshError(f"{name!r} has dtype {tensor.dtype}, expected {kept.dtype}")
        if hasattr(kept, "device_mesh"):  # split over ranks, each of which takes its part
            kept.to_local().copy_(_part_of(tensor.to(kept.device), kept))
        else:
            kept.copy_(tensor)

    def _take(self, slot: _Slot, source: Source, tensor: Tensor) -> None:
        method, module = self._methods[slot.name], self._modules[slot.name]
        if isinstance(method, OnlineLinearMethod):
            method.load(module, tensor, source.spec.name, method_device(module))
            return
        whole = Span.of(tensor)
        pieces = {source.expert: whole}
        if source.expert is None:
            shape = whole.shape[1:]
            size = math.prod(shape)
            pieces = {e: Span(whole.base, e * size, shape) for e in range(len(tensor))}
        arrivals: list[Arrival] = []
        for expert, piece in pieces.items():
            assert expert is not None
            arrivals += arrivals_of(source, expert, piece)
        if not source.is_bias:
            self._collect(slot, arrivals, tensor)
            return
        for index, part, bias, name in arrivals:
            method.load_bias(module, index, part, bias.tensor(), name)

    def _collect(self, slot: _Slot, arrivals: Sequence[Arrival], tensor: Tensor) -> None:
        """Arrivals that are parts of one tensor."""
        self._batch.setdefault(slot.name, []).extend(arrivals)
        self._held.append((arrivals[0][3], tensor, _version(tensor)))
        self._batched += slot.nbytes
        if self._batched >= _BATCH:
            self._flush()

    def _flush(self) -> None:
        batch, self._batch, self._batched = self._batch, {}, 0
        held, self._held = self._held, []
        for name, tensor, version in held:
            if _version(tensor) != version:
                raise RefreshError(
                    f"{name!r} was written to before it was read",
                    hint="give every tensor memory of its own until refresh returns",
                )
        for layer, arrivals in batch.items():
            method = self._methods[layer]
            assert isinstance(method, OnlineMoEMethodBase)
            method.load_experts(self._modules[layer], arrivals)

    def _check_complete(self) -> None:
        for name, method in self._methods.items():
            method.check_arrived(name)
        names = (
            f"{t.shape.name}.{n}" for t in self._table.layers.values() for n in original_names(t)
        )
        check_rest(self._table.original, self._fed | set(names))
        finite = {name: finite_scales(module) for name, module in self._modules.items()}
        for name, is_finite in finite.items():  # a GPU is asked once all that has been launched
            if not bool(is_finite):
                raise RefreshError(f"{name}: NaN or Inf among the new weights")


def _version(tensor: Tensor) -> int:
    """Grows with every operator that writes to a tensor or to a view of it."""
    return 0 if tensor.is_inference() else tensor._version


def _part_of(tensor: Tensor, kept: Any) -> Tensor:
    """What this rank holds of a tensor that is split as `kept` is."""
    from torch.distributed.tensor import distribute_tensor

    split: Any = distribute_tensor(tensor, kept.device_mesh, kept.placements, src_data_rank=None)
    part: Tensor = split.to_local()
    return part


def method_device(module: nn.Module) -> torch.device:
    return next(module.parameters(recurse=False)).device


_tables: weakref.WeakKeyDictionary[nn.Module, _Table] = weakref.WeakKeyDictionary()


def _table_of(model: nn.Module) -> _Table:
    if model not in _tables:
        _tables[model] = _Table(model)
    return _tables[model]
