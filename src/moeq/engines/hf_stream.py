"""Every tensor that moeq reads itself, in one stream, into the layers of a transformers model.

On a CPU those are the sources of quantized layers, and what is kept but stored as codes; the rest
transformers maps from the file. For a GPU they are all tensors that no conversion touches: copies
from pinned memory, beside the quantized ones, take a tenth of the time of transformers' own.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moeq.checkpoint.encodings import decoding_bytes
from moeq.checkpoint.headers import TensorSpec
from moeq.checkpoint.ring import Event, Ring, feed
from moeq.checkpoint.stream import (
    CHUNK_BYTES,
    Chunk,
    Piece,
    chunks_of,
    matrix,
    read_piece,
    rows,
    stream,
    whole,
)
from moeq.config import OnlineQuantizationConfig
from moeq.engines.hf_routes import Decision, KeptExperts
from moeq.engines.hf_structure import Target
from moeq.memory import available_bytes
from moeq.methods.base import OnlineMoEMethodBase
from moeq.methods.linear import OnlineLinearMethod
from moeq.methods.parameters import finite_scales
from moeq.plan import LayerShape, Part, Source
from moeq.quantize import check_finite
from moeq.span import Span

Method = OnlineMoEMethodBase | OnlineLinearMethod

_WINDOW = 1 << 30
"""Bytes of buffers at most, on the host and on a GPU each."""

_MOST_WORKERS = 12
"""Threads that read as fast as memory or a disk allows; more wait for Python's lock."""

_RING = 384 << 20
"""Bytes of page-locked buffers: to lock them takes as long as to read ten times as many."""

_GPU_CHUNK = 32 << 20
"""Bytes that go to a GPU at once: each time costs launches."""

_STREAMS = 2
"""The copy of one chunk and the kernels of another overlap."""

_QUANTIZING = 6 << 20
"""Bytes that a worker on a CPU needs to quantize a matrix, see `moeq.quantize._CHUNK`."""

_MODEL = 1 << 20
"""Bytes of a model's Python objects, threads and whatever else does not grow."""

_BOOKKEEPING = 2700
"""Bytes that a tensor of a checkpoint costs in names, headers and plans, measured for 18,000."""


@dataclass(frozen=True)
class _Quantized:
    """A piece of a layer that is quantized: one matrix or bias, of one expert where it has them."""

    target: Target
    source: Source
    expert: int | None


@dataclass(frozen=True)
class _Kept:
    """Entries first.. along the first dimension of a parameter that is kept as it is."""

    parameter: str
    first: int


@dataclass(frozen=True)
class _Merged:
    """A piece of experts that are kept, but merged: one matrix or bias of one expert."""

    module: nn.Module
    parameter: str
    source: Source
    expert: int


class LayerStream:
    """One load.

    Args:
        model: on the meta device; it says which dtype a kept parameter gets.
        decision: which tensors go where.
        methods: by the layer's name; filled in before `run`.
        device: where everything ends up.
        kept: further tensors, by a name under which `tensors` has their place; where absent, those
            that no conversion touches: for a GPU all, for a CPU those that are stored as codes.
    """

    def __init__(
        self,
        model: nn.Module,
        decision: Decision,
        methods: Mapping[str, Method],
        device: torch.device,
        kept: Mapping[str, TensorSpec] | None = None,
    ) -> None:
        self._methods = methods
        self._device = device
        self._targets = decision.targets
        self._state = model.state_dict()
        if kept is None:
            kept = decision.routes.plain if streams_kept(device) else decision.routes.encoded
        self.kept = kept
        self.maps_rest = not streams_kept(device)  # what transformers loads
        self.tensors: dict[str, Tensor] = {}
        sources = {plan.shape.name: plan.sources for plan in decision.routes.plans}
        self._modules = {target.shape.name: target.module for target in self._targets}
        self._pieces = [p for t in self._targets for p in pieces_of(t, sources[t.shape.name])]
        self._pieces += [piece for name, spec in self.kept.items() for piece in _kept(name, spec)]
        self._merged = decision.routes.kept_experts
        self._pieces += [piece for experts in self._merged for piece in _merged(experts)]
        total = sum(piece.held_bytes for piece in self._pieces)
        on_gpu = device.type == "cuda"
        size = _GPU_CHUNK if on_gpu else CHUNK_BYTES
        self._chunks = chunks_of(self._pieces, min(size, max(1 << 20, total // 64)))
        largest = max((chunk.buffer_bytes for chunk in self._chunks), default=0)
        decoded = max((chunk.decoded_bytes for chunk in self._chunks), default=0)
        piece = max((piece.held_bytes for piece in self._pieces), default=0)
        # A small checkpoint is read in no time, and a window would be most of what it takes
        limit = min(_RING if on_gpu else _WINDOW, available_bytes() // 4, total // 8)
        # A CPU's worker has its chunk, a transposed and a waiting copy, and temporaries; of a GPU's
        # buffers some are read into while one is copied
        each = largest if on_gpu else largest + 2 * piece + min(_QUANTIZING, 8 * piece)
        # Columns of down, and what is decoded, are copies until their chunk is done
        copies = largest if any(t.shape.local_channels for t in self._targets) else 0
        copies += decoded + decoding_bytes(device, decoded // 2)
        each += 0 if on_gpu else copies
        # On a CPU some wait for the disk while others quantize
        wanted = min(os.cpu_count() or 1 if on_gpu else torch.get_num_threads() + 2, _MOST_WORKERS)
        affordable = limit // max(each, 1)
        self.workers = wanted if on_gpu else max(1, min(wanted, affordable))
        self._buffers = min(len(self._chunks), max(2, affordable))
        self._largest = largest
        objects = _BOOKKEEPING * len(self._pieces) + _MODEL
        if on_gpu:
            self.host_bytes = self._buffers * largest + objects
            # A chunk of each stream, and a matrix that waits for its pair or was transposed
            self.window_bytes = _STREAMS * (largest + 2 * piece + copies)
        else:
            self.host_bytes = self.window_bytes = self.workers * each + objects
        self._ring: Ring | None = None

    def prepare(self) -> None:
        """Begin to take what takes time to take: page-locked memory."""
        if self._device.type == "cuda" and self._chunks:
            self._ring = Ring(self._buffers, self._largest)

    def run(self, on_bytes: Callable[[int], None]) -> None:
        """Take the memory of the final weights, then fill it.

        Raises:
            MoeqError: see `moeq.checkpoint.stream` and the methods' `load`s.
        """
        for target in self._targets:
            method = self._methods[target.shape.name]
            if isinstance(method, OnlineMoEMethodBase):
                method.materialize(target.module, self._device)
        for name, spec in self.kept.items():
            if name not in self.tensors:
                dtype = self._state[name].dtype
                self.tensors[name] = torch.empty(spec.shape, dtype=dtype, device=self._device)
        for experts in self._merged:
            for name in experts.sources:
                like = self._state[name]
                self.tensors[name] = torch.empty(like.shape, dtype=like.dtype, device=self._device)
        if self._ring is not None:
            self._feed_gpu(self._ring, on_bytes)
        else:
            stream(self._chunks, self._use, workers=self.workers, on_bytes=on_bytes)
        self._warn_of_empty_experts()

    def _feed_gpu(self, ring: Ring, on_bytes: Callable[[int], None]) -> None:
        """One copy of every chunk, then its pieces, on one of some streams in turn."""
        device = self._device
        with torch.cuda.device(device):
            main = torch.cuda.current_stream()
            streams = [torch.cuda.Stream() for _ in range(_STREAMS)]  # type: ignore[no-untyped-call]
            for other in streams:
                other.wait_stream(main)  # the memory of the weights may have been another's
            turns = itertools.cycle(streams)

            def use(chunk: Chunk, buffer: Tensor) -> Event:
                with torch.cuda.stream(next(turns)):
                    self._use(chunk, buffer[: chunk.buffer_bytes].to(device, non_blocking=True))
                    event: Event = torch.cuda.current_stream().record_event()
                    return event

            feed(ring, self._chunks, use, readers=self.workers, on_bytes=on_bytes)
            for other in streams:
                main.wait_stream(other)
        self._check_finite()

    def _use(self, chunk: Chunk, buffer: Tensor) -> None:
        arrivals: dict[str, list[Arrival]] = {}
        for piece, span in chunk.spans(buffer):
            if isinstance(piece.key, _Kept):
                tensor = span.tensor()
                if piece.spec.is_flipped:
                    tensor = tensor.mT
                kept, first = self.tensors[piece.key.parameter], piece.key.first
                (kept[first : first + len(tensor)] if tensor.ndim else kept).copy_(tensor)
                continue
            if isinstance(piece.key, _Merged):
                merged = piece.key
                tensor = self.tensors[merged.parameter]
                for expert, part, arrived, _ in arrivals_of(merged.source, merged.expert, span):
                    _place(tensor[expert], merged.module, part).copy_(arrived.tensor())
                continue
            target, source = piece.key.target, piece.key.source
            method, name = self._methods[target.shape.name], target.shape.name
            if isinstance(method, OnlineLinearMethod):
                method.load(target.module, span.tensor(), where(source), self._device)
            elif source.is_bias:
                for expert, part, bias, what in arrivals_of(source, piece.key.expert, span):
                    method.load_bias(target.module, expert, part, bias.tensor(), what)
            else:
                arrivals.setdefault(name, []).extend(arrivals_of(source, piece.key.expert, span))
        for name, mine in arrivals.items():
            method = self._methods[name]
            assert isinstance(method, OnlineMoEMethodBase)
            method.load_experts(self._modules[name], mine)

    def _check_finite(self) -> None:
        """On a GPU nobody waited to see whether scales are numbers. Where one is not, the layer's
        tensors are read again, to name the one and the place."""
        for target in self._targets:
            if bool(finite_scales(target.module)):
                continue
            for piece in self._pieces:
                if isinstance(piece.key, _Quantized) and piece.key.target is target:
                    tensor, source = read_piece(piece), piece.key.source
                    check_finite(tensor, tensor.abs().amax(), where(source))

    def _warn_of_empty_experts(self) -> None:
        for target in self._targets:
            method = self._methods[target.shape.name]
            if isinstance(method, OnlineMoEMethodBase):
                warn_of_empty_experts(method, target.module, target.shape.name)


def warn_of_empty_experts(method: OnlineMoEMethodBase, layer: nn.Module, name: str) -> None:
    """Zeros are numbers, but an expert of nothing else was never trained, or lost."""
    empty = method.empty_experts(layer)
    if empty:
        more = f" and {len(empty) - 1} more" if len(empty) > 1 else ""
        warnings.warn(f"{name}: every weight is zero in expert {empty[0]}{more}", stacklevel=2)


Arrival = tuple[int, Any, Span, str]
"""Expert, projection, matrix or bias, name for messages: as the methods' `load`s take them."""


def create_method(
    config: OnlineQuantizationConfig, target: Target, dtype: torch.dtype
) -> OnlineMoEMethodBase | OnlineLinearMethod:
    """The method of a layer, which has registered the quantized parameters on the meta device.

    Args:
        config: which scheme the layer gets.
        target: the layer.
        dtype: of activations and biases.
    """
    shape = target.shape
    method = config.get_quant_method(shape.name, shape.kind)
    assert method is not None
    if isinstance(method, OnlineLinearMethod):
        method.create_weights(
            target.module,
            in_features=shape.hidden_size,
            out_features=shape.intermediate_size,
            dtype=dtype,
        )
    else:
        method.create_weights(
            target.module,
            num_experts=shape.num_experts,
            hidden_size=shape.hidden_size,
            intermediate_size=shape.intermediate_size,
            is_gated=shape.is_gated,
            has_bias=shape.has_bias,
            dtype=dtype,
            local_experts=shape.local_experts,
            local_channels=shape.local_channels,
        )
    return method


def streams_kept(device: torch.device) -> bool:
    """Whether what is not quantized is streamed too. Where the model lives in main memory a mapping
    of the file takes no time and no memory."""
    return device.type == "cuda"


def arrivals_of(source: Source, expert: int, span: Span) -> list[Arrival]:
    """The projections in one matrix [N, K] or bias [N] of an expert."""
    name = where(source)
    if source.transposed:
        span = Span.of(span.tensor().T)
    if source.part != "gate_up":
        parts = [(source.part, span)]
    elif source.interleaved:
        tensor = span.tensor()
        parts = [("gate", Span.of(tensor[0::2])), ("up", Span.of(tensor[1::2]))]
    else:
        gate, up = span.halves()
        parts = [("gate", gate), ("up", up)]
    if source.expert is not None:
        return [(expert, part, piece, name) for part, piece in parts]
    # What is said about a piece counts from its first row
    return [(expert, part, piece, f"{name}, {part} of expert {expert}") for part, piece in parts]


def where(source: Source) -> str:
    """File and tensor, for messages."""
    return f"{source.spec.file.name}: {source.spec.name}"


def pieces_of(target: Target, sources: tuple[Source, ...]) -> list[Piece]:
    pieces, shape = [], target.shape
    for source in sources:
        found = []
        if shape.kind == "moe" and source.expert is None:
            for expert in shape.experts:
                found.append(matrix(source.spec, _Quantized(target, source, expert), expert))
        elif source.expert is None or source.expert in shape.experts:
            found.append(whole(source.spec, _Quantized(target, source, source.expert)))
        for piece in found:
            pieces += _local_rows(piece, shape) if shape.reads_rows(source) else [piece]
    return pieces


def _local_rows(piece: Piece, shape: LayerShape) -> list[Piece]:
    """Of a matrix [P * I, H], the rows of local channels of each of its P projections."""
    key: _Quantized = piece.key
    channels, (count, *rest) = shape.channels, piece.shape
    parts: tuple[Part, ...] = (key.source.part,)
    if key.source.part == "gate_up":
        parts = ("gate", "up")
    pieces = []
    for index, part in enumerate(parts):
        first = index * count // len(parts) + channels.start
        begin = piece.begin + first * (piece.nbytes // count)
        mine = dataclasses.replace(key, source=dataclasses.replace(key.source, part=part))
        pieces.append(Piece(piece.spec, mine, begin, (len(channels), *rest)))
    return pieces


def _merged(experts: KeptExperts) -> list[Piece]:
    pieces = []
    for parameter, sources in experts.sources.items():
        for source in sources:
            if source.expert is not None:
                key = _Merged(experts.module, parameter, source, source.expert)
                pieces.append(whole(source.spec, key))
                continue
            for expert in range(experts.shape.num_experts):
                key = _Merged(experts.module, parameter, source, expert)
                pieces.append(matrix(source.spec, key, expert))
    return pieces


def _place(tensor: Tensor, module: Any, part: Part) -> Tensor:
    """One projection [N, K], or [N] of a bias, in an expert's tensor as the module lays it out."""
    if module.is_transposed and tensor.ndim == 2:
        tensor = tensor.mT
    if part == "down" or not module.has_gate:
        return tensor
    if module.is_concatenated:
        return tensor.chunk(2)[part == "up"]
    return tensor[part == "up" :: 2]


def _kept(parameter: str, spec: TensorSpec) -> list[Piece]:
    if not spec.shape or not spec.nbytes:
        return [whole(spec, _Kept(parameter, 0))]
    step = max(1, CHUNK_BYTES // (spec.held_bytes // spec.shape[0]))
    return [
        rows(spec, _Kept(parameter, first), first, min(step, spec.shape[0] - first))
        for first in range(0, spec.shape[0], step)
    ]
