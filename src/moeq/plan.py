"""What becomes of every tensor, decided from headers before the first byte is read.

An engine says which layers its model has and which checkpoint tensors feed them (`Source`); the
plan checks that they are all there, once each, in the right shape and dtype, and adds up bytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from moeq.checkpoint.headers import TensorSpec
from moeq.errors import CheckpointError
from moeq.experts import code_columns, group_shape, scale_shape
from moeq.quantize import WEIGHT_DTYPES
from moeq.schemes import LayerKind, OnlineQuantScheme

Part = Literal["gate", "up", "gate_up", "down"]


@dataclass(frozen=True)
class Source:
    """A checkpoint tensor that feeds a quantized layer.

    Attributes:
        spec: the tensor.
        part: of an expert; "gate_up" holds both, "down" also stands for the weight of a linear.
        expert: whose; None where the tensor stacks all experts along its first dimension.
        transposed: whether matrices are stored [in, out].
        interleaved: whether a "gate_up" alternates rows of gate and up.
        is_bias: whether it holds biases and not weights.
    """

    spec: TensorSpec
    part: Part
    expert: int | None = None
    transposed: bool = False
    interleaved: bool = False
    is_bias: bool = False


@dataclass(frozen=True)
class LayerShape:
    """Sizes of a layer to be quantized: experts, or one linear (num_experts 1, not gated).

    Attributes:
        name: of the module.
        kind: "moe" or "linear".
        num_experts: E.
        hidden_size: H; input columns of a linear.
        intermediate_size: I; output rows of a linear.
        is_gated: whether experts have a gate beside up.
        has_bias: whether experts have biases (a linear's bias is not ours).
        local_experts: ids of the experts that this rank holds; all where absent.
        local_channels: those of the I that this rank holds of every expert; all where absent.
    """

    name: str
    kind: LayerKind
    num_experts: int
    hidden_size: int
    intermediate_size: int
    is_gated: bool = False
    has_bias: bool = False
    local_experts: range | None = None
    local_channels: range | None = None

    @property
    def experts(self) -> range:
        """Ids of the experts held here."""
        return range(self.num_experts) if self.local_experts is None else self.local_experts

    @property
    def channels(self) -> range:
        """Of the I held here."""
        every = range(self.intermediate_size)
        return every if self.local_channels is None else self.local_channels

    def reads_rows(self, source: Source) -> bool:
        """Whether only the local channels of a matrix are read. They lie together in gate and up;
        of a row of down, the scale needs the whole."""
        together = source.part != "down" and not (source.transposed or source.interleaved)
        return self.local_channels is not None and together

    def matrix_shape(self, part: Part) -> tuple[int, int]:
        """[N, K] of one projection of one expert."""
        hidden, intermediate = self.hidden_size, self.intermediate_size
        if self.kind == "linear":
            return intermediate, hidden
        match part:
            case "down":
                return hidden, intermediate
            case "gate_up":
                return 2 * intermediate, hidden
            case _:
                return intermediate, hidden

    @property
    def num_weights(self) -> int:
        """Of all matrices on all ranks, biases not counted."""
        per_expert = self.hidden_size * self.intermediate_size
        matrices = 1 if self.kind == "linear" else 3 if self.is_gated else 2
        return self.num_experts * matrices * per_expert

    def quantized_bytes(self, scheme: OnlineQuantScheme, bias_itemsize: int) -> int:
        """Bytes of codes, scales and biases held here under a scheme."""
        held = len(self.experts)
        parts = 2 if self.is_gated else 1
        width = len(self.channels)
        down = self.matrix_shape("down") if self.kind == "linear" else (self.hidden_size, width)
        up = (parts * width, self.hidden_size)
        matrices = [((held, *down), 1)]
        if self.kind == "moe":
            matrices.append(((held, *up), parts))
        total = 0
        for shape, stacked in matrices:
            scales = math.prod(scale_shape(scheme.granularity, shape, stacked))
            codes = math.prod(shape[:-1]) * code_columns(scheme, shape[-1])
            total += codes * scheme.weight_dtype.itemsize + 4 * scales
            total += math.prod(group_shape(scheme, shape) or (0,))
        if self.has_bias:
            total += held * (up[0] + down[0]) * bias_itemsize
        return total


@dataclass(frozen=True)
class LayerPlan:
    """One layer, its scheme and where its weights come from."""

    shape: LayerShape
    scheme: OnlineQuantScheme
    sources: tuple[Source, ...]

    @property
    def source_bytes(self) -> int:
        """Read here from the checkpoint for this layer."""
        return sum(self._read_bytes(source) for source in self.sources)

    @property
    def bias_bytes(self) -> int:
        """Of those, biases."""
        return sum(self._read_bytes(source) for source in self.sources if source.is_bias)

    @property
    def original_bytes(self) -> int:
        """Of what is read here, were it held unquantized."""
        return sum(self._read_bytes(source, source.spec.held_bytes) for source in self.sources)

    @property
    def skipped_bytes(self) -> int:
        """Of this layer's tensors, what other ranks read."""
        return sum(source.spec.nbytes for source in self.sources) - self.source_bytes

    @property
    def final_bytes(self) -> int:
        """Held once loaded."""
        itemsizes = [s.spec.dtype.itemsize for s in self.sources if s.is_bias]
        return self.shape.quantized_bytes(self.scheme, itemsizes[0] if itemsizes else 0)

    @property
    def filled(self) -> str:
        """What the scheme does to rows that its groups do not divide; "" where they do."""
        group = self.scheme.group or 1
        parts: tuple[Part, ...] = ("up", "down") if self.shape.kind == "moe" else ("down",)
        widths = dict.fromkeys(self.shape.matrix_shape(part)[1] for part in parts)
        odd = [f"{width} to {-(-width // group) * group}" for width in widths if width % group]
        return f"rows are filled up with zeros: {', '.join(odd)} columns" if odd else ""

    def _read_bytes(self, source: Source, nbytes: int | None = None) -> int:
        """A rank's share of a tensor; of its `nbytes`, those stored where absent."""
        nbytes, experts = nbytes or source.spec.nbytes, self.shape.experts
        if self.shape.reads_rows(source):
            nbytes = nbytes * len(self.shape.channels) // self.shape.intermediate_size
        if source.expert is None:
            return nbytes * len(experts) // self.shape.num_experts
        return nbytes if source.expert in experts else 0


@dataclass(frozen=True)
class LoadPlan:
    """The whole model, or a rank's share: of quantized layers its own experts, of all else
    everything, because only transformers knows what it splits.

    Attributes:
        layers: that are quantized.
        checkpoint_bytes: of all tensors in the checkpoint.
        unquantized_bytes: of expert weights that are not quantized.
        unquantized_weights: how many these are.
        kept: layer -> the named rule that keeps it unquantized.
        dropped: tensors that the model has no place for.
        window_bytes: the most that loading holds beyond the final weights, where they are.
        host_bytes: the most that it holds in main memory, the final weights aside.
        mapped_bytes: of the final weights, what stays in the files and is mapped from there.
        decoded_bytes: by which tensors that are kept grow, because they are stored as codes.
    """

    layers: tuple[LayerPlan, ...]
    checkpoint_bytes: int
    unquantized_bytes: int
    unquantized_weights: int
    kept: dict[str, str]
    dropped: tuple[str, ...]
    window_bytes: int
    host_bytes: int
    mapped_bytes: int
    decoded_bytes: int = 0

    @property
    def final_bytes(self) -> int:
        """Weights held once loaded: quantized layers, and everything else as it is stored, or in
        bf16 where that is as codes."""
        saved = sum(layer.source_bytes - layer.final_bytes for layer in self.layers)
        return self.checkpoint_bytes + self.decoded_bytes - saved

    @property
    def peak_bytes(self) -> int:
        """Final weights, without those that are mapped, and the window."""
        return self.final_bytes - self.mapped_bytes + self.window_bytes

    @property
    def expert_bytes(self) -> int:
        """Checkpoint bytes of expert weights, quantized or not; biases not counted."""
        quantized = sum(layer.source_bytes - layer.bias_bytes for layer in self._moe_layers)
        return quantized + self.unquantized_bytes

    @property
    def final_expert_bytes(self) -> int:
        """Held for expert weights once loaded: codes and scales, and what is not quantized."""
        quantized = sum(layer.final_bytes - layer.bias_bytes for layer in self._moe_layers)
        return quantized + self.unquantized_bytes

    @property
    def final_linear_bytes(self) -> int:
        """Held for quantized linears once loaded."""
        return sum(layer.final_bytes for layer in self.layers if layer.shape.kind == "linear")

    @property
    def coverage(self) -> float:
        """Share of the expert weights that are quantized, 0 to 1."""
        quantized = sum(layer.shape.num_weights for layer in self._moe_layers)
        every = quantized + self.unquantized_weights
        return quantized / every if every else 0.0

    @property
    def filled(self) -> dict[str, str]:
        """Layer -> how its rows become wider, where they do."""
        return {layer.shape.name: layer.filled for layer in self.layers if layer.filled}

    @property
    def _moe_layers(self) -> list[LayerPlan]:
        return [layer for layer in self.layers if layer.shape.kind == "moe"]


def check_sources(shape: LayerShape, sources: Iterable[Source]) -> None:
    """Every projection of every expert exactly once, in the right shape and dtype.

    Raises:
        CheckpointError: naming the tensor and, for a missing one, the name it should have.
    """
    sources = tuple(sources)
    wanted: dict[tuple[int, str, bool], None] = {}
    projections = {"gate", "up", "down"} if shape.is_gated else {"up", "down"}
    if shape.kind == "linear":
        projections = {"down"}
    for is_bias in (False, True) if shape.has_bias else (False,):
        for expert in range(shape.num_experts):
            wanted.update({(expert, part, is_bias): None for part in sorted(projections)})
    for source in sources:
        check_source(shape, source)
        experts = range(shape.num_experts) if source.expert is None else (source.expert,)
        parts = ("gate", "up") if source.part == "gate_up" else (source.part,)
        for expert in experts:
            for part in parts:
                if (expert, part, source.is_bias) not in wanted:
                    raise CheckpointError(
                        f"{source.spec.file.name}: {source.spec.name!r} is a second {part}"
                        f" projection of expert {expert} of {shape.name}",
                        hint="the checkpoint has it twice, perhaps fused and one by one",
                    )
                del wanted[expert, part, source.is_bias]
    if wanted:
        name = f"{shape.name}.weight"
        if shape.kind == "moe":
            name = _missing_name(sources, *next(iter(wanted)))
        raise CheckpointError(
            f"{shape.name}: missing from the checkpoint: {name}"
            + (f" and {len(wanted) - 1} more" if len(wanted) > 1 else ""),
            hint="the checkpoint is incomplete, or config.json asks for more than it holds",
        )


def check_source(shape: LayerShape, source: Source) -> None:
    """That one tensor is what the layer expects of its kind.

    Raises:
        CheckpointError: another expert, dtype or shape.
    """
    spec = source.spec
    if source.expert is not None and not 0 <= source.expert < shape.num_experts:
        raise CheckpointError(
            f"{spec.file.name}: {spec.name!r} is of expert {source.expert}; {shape.name} has"
            f" {shape.num_experts}",
            hint="config.json and checkpoint disagree on the number of experts",
        )
    if spec.dtype not in WEIGHT_DTYPES:
        raise CheckpointError(
            f"{spec.file.name}: {spec.name!r} has dtype {spec.dtype}, expected bfloat16, float16"
            " or float32",
            hint="the checkpoint is already quantized; moeq starts from unquantized ones",
        )
    n, k = shape.matrix_shape(source.part)
    want: tuple[int, ...] = (n,) if source.is_bias else (k, n) if source.transposed else (n, k)
    if source.expert is None and shape.kind == "moe":
        want = (shape.num_experts, *want)
    found = spec.stored_shape
    if found != want:
        raise CheckpointError(
            f"{spec.file.name}: {spec.name!r} has shape {list(found)}, expected {list(want)}"
            f" for {shape.name}",
            hint="config.json and checkpoint disagree",
        )


def _missing_name(sources: tuple[Source, ...], expert: int, part: str, is_bias: bool) -> str:
    """What the tensor would be called, judged by its siblings in other experts."""
    for source in sources:
        if source.part == part and source.is_bias == is_bias and source.expert is not None:
            head, dot, tail = source.spec.name.rpartition(f".{source.expert}.")
            if dot:
                return f"{head}.{expert}.{tail}"
    return f"{part}{' bias' if is_bias else ''} of expert {expert}"
