"""`OnlineMoEMethodBase`: how a MoE layer's weights come to be quantized while they load.

    create_weights   parameters on the meta device: shapes are known, no memory is taken
    load_expert      one expert's projection arrives in the checkpoint's dtype; it is quantized at
                     once, in fp32, into final storage, and may then be freed
    load_bias        the same for experts with biases
    process_weights_after_loading
                     once: everything must have arrived; the oracle picks the kernel
    apply            the layer after its router

The layer is any `nn.Module`; the method adds `w13_codes`, `w13_scale`, `w2_codes`, `w2_scale`;
where the scheme has groups, `w13_group_scale` and `w2_group_scale`; where experts have biases,
`w13_bias` and `w2_bias` (layout: `moeq.experts`). So at no time does a
layer's bf16 weight exist as a whole, and nothing depends on the order of arrival.

Under expert parallelism a layer is created with the global ids of its local experts: storage and
scales are sized by those, tensors of other experts are skipped on arrival. Under tensor parallelism
it is created with its local channels of the I between the projections: rows of gate and up, columns
of down. A row of down then has its scale from all its columns, so that codes are a part of those
that one process would have.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from moeq import four_bits, ops
from moeq.errors import CheckpointError, ModelError
from moeq.experts import ExpertWeights, code_columns, scale_shape
from moeq.kernels.activations import ACTIVATIONS
from moeq.methods.matrices import Place, part_of, quantize_matrices
from moeq.methods.parameters import (
    align,
    arrange,
    check_scales,
    check_weight_dtype,
    parameter,
    register_matrices,
    register_meta,
    restore,
    storage,
    stored,
)
from moeq.oracle import Choice, KernelRequest, select_backend
from moeq.quantize import WEIGHT_DTYPES, check_finite, dequantize
from moeq.schemes import BLOCK, Granularity, OnlineQuantScheme
from moeq.span import Span

Projection = Literal["gate", "up", "down"]

Gate = Callable[[Tensor], Tensor]
"""A model's own gate: [S, P * I] in canonical order (gate, then up) -> [S, I]."""


class OnlineMoEMethodBase:
    """One instance per layer. Subclasses say which scheme; those whose scales span projections
    override `_ready`."""

    scheme: ClassVar[OnlineQuantScheme]

    def __init__(self, *, backend: str | None = None) -> None:
        self.backend = backend
        self.choice: Choice | None = None
        self._waiting: set[tuple[int, str]] = set()
        self._local: dict[int, int] = {}

    def create_weights(
        self,
        layer: nn.Module,
        *,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        is_gated: bool = True,
        has_bias: bool = False,
        dtype: torch.dtype = torch.bfloat16,
        local_experts: Sequence[int] | None = None,
        local_channels: range | None = None,
    ) -> None:
        """Register the quantized parameters on the meta device.

        Args:
            layer: gets the parameters.
            num_experts: of the whole model.
            hidden_size: H.
            intermediate_size: I.
            is_gated: whether experts have a gate beside up.
            has_bias: whether experts have biases.
            dtype: of the biases and of the activations.
            local_experts: global ids of the experts held here, in order; all where absent.
            local_channels: those of the I held here, all where absent. Scales are those of whole
                matrices; activations between the projections are quantized by what is here.

        Raises:
            ModelError: local experts that repeat or do not exist; channels that divide a block, or
                of experts with biases.
        """
        channels = range(intermediate_size) if local_channels is None else local_channels
        self._channels = None if local_channels is None else channels
        self._all_channels = intermediate_size
        intermediate_size = len(channels)
        local = range(num_experts) if local_experts is None else local_experts
        if len(set(local)) != len(local) or not all(0 <= e < num_experts for e in local):
            raise ModelError(
                f"local experts {list(local)}, expected different ids below {num_experts}"
            )
        self._local = {expert: slot for slot, expert in enumerate(local)}
        self._num_experts = num_experts
        self._is_gated = is_gated
        self._check_channels(channels, has_bias)
        self._hidden = hidden_size
        self._intermediate = intermediate_size
        self._dtype = dtype
        parts = self._parts
        shapes = {
            "w13": (len(self._local), parts * intermediate_size, hidden_size),
            "w2": (len(self._local), hidden_size, intermediate_size),
        }
        self._has_bias = has_bias
        self.expect_all()
        for name, shape in shapes.items():
            register_matrices(layer, name, shape, self.scheme, parts if name == "w13" else 1)
            if has_bias:
                register_meta(layer, f"{name}_bias", shape[:2], dtype)

    def _check_channels(self, channels: range, has_bias: bool) -> None:
        if len(channels) == self._all_channels:
            return
        if has_bias:
            raise ModelError(
                "ranks cannot share channels of experts with biases: each would add them",
                hint="share the experts (expert parallelism)",
            )
        ends = (channels.start, channels.stop)
        size = BLOCK if self.scheme.granularity is Granularity.BLOCK else self.scheme.group or 1
        if any(end % size and end != self._all_channels for end in ends):
            raise ModelError(
                f"channels {channels.start} to {channels.stop} of {self._all_channels} divide"
                f" {size} weights of a row, which share a scale",
                hint="share the experts (expert parallelism), use fewer ranks, or a scheme with a"
                " scale per channel",
            )

    def expect_all(self) -> None:
        """Everything is to arrive, for the first time or anew; storage stays where it is."""
        kinds = ("", " bias") if self._has_bias else ("",)
        self._waiting = {(e, p + k) for e in self._local for p in self.projections for k in kinds}

    def expect_nothing(self) -> None:
        """Whatever has not arrived will not."""
        self._waiting = set()

    def check_arrived(self, name: str) -> None:
        """That nothing is missing of the layer called `name`.

        Raises:
            CheckpointError: some expert's projection never arrived; named.
        """
        if self._waiting:
            expert, projection = min(self._waiting)
            raise CheckpointError(
                f"{name}: {len(self._waiting)} expert tensors never arrived,"
                f" the first: {projection} of expert {expert}",
                hint="the checkpoint is incomplete; nothing was filled in",
            )

    def empty_experts(self, layer: nn.Module) -> list[int]:
        """Global ids of local experts whose every weight is zero."""
        names = ("w13", "w2")
        scales = [parameter(layer, f"{name}_scale") for name in names]
        # Zeros have scale 1, so that hardly any codes need to be looked at
        ones = [(scale == 1).view(len(scale), -1).all(1) for scale in scales if scale.numel()]
        slots = torch.nonzero(torch.stack(ones).all(0))[:, 0].tolist() if ones else []
        codes = [parameter(layer, f"{name}_codes") for name in names]
        experts = list(self._local)
        kind = self.scheme.group_dtype
        zero = 0 if kind is None else four_bits.CODES[kind].ZERO
        return [experts[s] for s in slots if all(bool((c[s].float() == zero).all()) for c in codes)]

    @property
    def _parts(self) -> int:
        return 2 if self._is_gated else 1

    @property
    def projections(self) -> tuple[Projection, ...]:
        """What one expert consists of."""
        return ("gate", "up", "down") if self._is_gated else ("up", "down")

    def materialize(self, layer: nn.Module, device: torch.device) -> None:
        """Take the memory of the final weights, once; `load_expert` then fills it."""
        for name in self._parameter_names(layer):
            if parameter(layer, name).is_meta:
                empty = torch.empty_like(parameter(layer, name), device=device)
                setattr(layer, name, nn.Parameter(empty, requires_grad=False))

    def load_expert(
        self, layer: nn.Module, expert: int, projection: Projection, weight: Tensor, name: str
    ) -> None:
        """Quantize one projection of one expert into its place.

        Args:
            layer: that `create_weights` and `materialize` have seen.
            expert: global id. One that is not local is skipped.
            projection: "gate", "up" or "down".
            weight: [I, H] for gate and up, [H, I] for down; fp16, bf16 or fp32. Of gate and up
                also the rows of local channels alone.
            name: of the tensor in the checkpoint, for messages.

        Raises:
            CheckpointError: misshapen, of a wrong dtype, out of range, or here before.
            NonFiniteError: NaN or Inf among the values.
        """
        self.load_experts(layer, [(expert, projection, Span.of(weight), name)])

    def load_experts(
        self, layer: nn.Module, arrivals: Iterable[tuple[int, Projection, Span, str]]
    ) -> None:
        """Several at once, as `load_expert` takes them: on a GPU they cost one launch."""
        taken: list[tuple[int, str]] = []
        try:
            self._quantize(layer, arrivals, taken)
        except BaseException:
            self._waiting.update(taken)
            raise

    def _quantize(
        self,
        layer: nn.Module,
        arrivals: Iterable[tuple[int, Projection, Span, str]],
        taken: list[tuple[int, str]],
    ) -> None:
        waiting, local, channels = self._waiting, self._local, self._channels
        strides = {projection: self._strides(projection) for projection in self.projections}
        storages = [storage(layer, name) for name in ("w13", "w2")]
        device = storages[0].codes.device
        ready: tuple[list[Place], list[Place]] = [], []
        for expert, projection, weight, name in arrivals:
            arrival = (expert, projection)
            if arrival not in waiting and not self._arrives(expert, projection, name):
                continue
            shape, stride, begin, scale_stride, scale_begin = strides[projection]
            is_local = channels is None
            if channels is not None and self._are_local_rows(projection, weight):
                name, is_local = f"{name}, from row {channels.start}", True
            elif weight.shape != shape:
                raise CheckpointError(
                    f"{name}: shape {list(weight.shape)}, expected {list(shape)}"
                    f" for the {projection} projection of expert {expert}"
                )
            if weight.base.dtype not in WEIGHT_DTYPES:
                check_weight_dtype(weight.base, name)
            slot = local[expert]
            at, scale_at = slot * stride + begin, slot * scale_stride + scale_begin
            place = Place(weight, at, scale_at, name)
            if not is_local:
                place = self._local_part(projection, place, device)
            ready[projection == "down"].extend(self._ready(expert, projection, place, device))
            waiting.discard(arrival)  # at once: it could come a second time
            taken.append(arrival)
        for matrices, places in zip(storages, ready):
            quantize_matrices(matrices, places, self.scheme.granularity)

    def load_bias(
        self, layer: nn.Module, expert: int, projection: Projection, bias: Tensor, name: str
    ) -> None:
        """Put the bias [N] of one projection of one expert into its place, unquantized."""
        if not self._arrives(expert, f"{projection} bias", name):
            return
        target = parameter(layer, "w2_bias" if projection == "down" else "w13_bias")
        row = target.data[self._local[expert]]
        if projection != "down":
            row = row[self._rows(projection)]
        if bias.shape != row.shape:
            raise CheckpointError(f"{name}: shape {list(bias.shape)}, expected {list(row.shape)}")
        check_finite(bias, bias.abs().amax() if bias.numel() else bias, name)
        row.copy_(bias)
        self._waiting.discard((expert, f"{projection} bias"))

    def process_weights_after_loading(
        self,
        layer: nn.Module,
        *,
        activation: str | None = None,
        gate: Gate | None = None,
        after: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """Check that everything arrived and choose the kernel. Calls after the first do nothing.

        Args:
            layer: with its final weights.
            activation: a name in `ACTIVATIONS`, where the standard gate (or none) applies.
            gate: the model's own gate, where no name says what it does.
            after: with a gate, what the model applies to every expert's output [S, H].

        Raises:
            CheckpointError: some expert's projection never arrived; named.
            BackendError: no kernel runs this here.
        """
        if self.choice is not None:
            return
        if (activation is None) == (gate is None):
            raise ModelError("a MoE layer needs either an activation's name or a gate of its own")
        if activation is not None and activation not in ACTIVATIONS:
            raise ModelError(
                f"unknown activation {activation!r}", hint=f"known: {', '.join(ACTIVATIONS)}"
            )
        self.check_arrived("the layer")
        self.choice = self.select_backend(parameter(layer, "w13_codes").device, activation)
        self._activation, self._gate, self._after = activation, gate, after
        self.arrange(layer)

    def arrange(self, layer: nn.Module) -> None:
        """Let codes lie as the chosen kernel reads them fastest, in place. The layer runs either
        way; which way they lie shows in their dtype."""
        if self.choice is not None and self.choice.backend.name == "cpu":
            arrange(layer, "w13", self._hidden)
            arrange(layer, "w2", self._intermediate)

    def restore(self, layer: nn.Module) -> None:
        """Let codes lie as `moeq.experts` has them, in place: to be written, or to be saved."""
        restore(layer, "w13")
        restore(layer, "w2")

    def select_backend(self, device: torch.device, activation: str | None) -> Choice:
        """The kernel that would run: to ask before anything is loaded.

        Raises:
            BackendError: none does.
        """
        request = KernelRequest(
            "moe",
            self.scheme,
            device,
            self._dtype,
            activation,
            num_experts=len(self._local),
            width=max(self._hidden, self._intermediate),
        )
        return select_backend(request, self.backend)

    def mark_loaded(self, layer: nn.Module, name: str) -> None:
        """Everything arrived already quantized, in a checkpoint that moeq saved.

        Raises:
            CheckpointError: scales of the layer called `name` that no quantizer makes.
        """
        for matrices in ("w13", "w2"):
            check_scales(layer, matrices, name)
        self._waiting.clear()
        for codes in ("w13_codes", "w2_codes"):
            align(parameter(layer, codes))

    def weights(self, layer: nn.Module) -> ExpertWeights:
        """The layer's quantized weights, as any kernel takes them: a copy of what is arranged."""
        w13, w2 = stored(layer, "w13"), stored(layer, "w2")
        return ExpertWeights(
            self.scheme,
            w13.codes,
            w13.scales,
            w2.codes,
            w2.scales,
            layer._parameters.get("w13_bias"),
            layer._parameters.get("w2_bias"),
            w13.groups,
            w2.groups,
            parts=self._parts,
        )

    def dequantized(self, layer: nn.Module, expert: int) -> tuple[Tensor, Tensor]:
        """What acts of the expert in a slot: fp32 [P * I, H], gate then up, and [H, I]."""
        stacks = ("w13", self._hidden, self._parts), ("w2", self._intermediate, 1)
        w13, w2 = (
            dequantize(
                codes,
                scales,
                self.scheme.granularity,
                parts=parts,
                group_scale=groups,
                columns=columns,
            )
            for name, columns, parts in stacks
            for codes, scales, groups in [stored(layer, name, expert)]
        )
        return w13, w2

    def apply(self, layer: nn.Module, x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        """The MoE layer after its router.

        Args:
            layer: processed.
            x: [T, H].
            topk_ids: [T, k] integer, local ids; anything outside 0..E-1 adds nothing.
            topk_weights: [T, k].

        Returns:
            [T, H] in the dtype of x.
        """
        assert self.choice is not None, "apply before process_weights_after_loading"
        if self._gate is not None:
            return self._apply_own_gate(layer, x, topk_ids, topk_weights)
        assert self._activation is not None
        out: Tensor = ops.fused_experts(
            x,
            topk_ids,
            topk_weights,
            parameter(layer, "w13_codes"),
            parameter(layer, "w13_scale"),
            parameter(layer, "w2_codes"),
            parameter(layer, "w2_scale"),
            layer._parameters.get("w13_bias"),
            layer._parameters.get("w2_bias"),
            layer._parameters.get("w13_group_scale"),
            layer._parameters.get("w2_group_scale"),
            self._parts,
            self.scheme.value,
            self._activation,
            self.choice.backend.name,
        )
        return out

    def _apply_own_gate(
        self, layer: nn.Module, x: Tensor, topk_ids: Tensor, topk_weights: Tensor
    ) -> Tensor:
        """The two halves of the layer around Python code of the model."""
        assert self.choice is not None and self._gate is not None
        backend, scheme = self.choice.backend.name, self.scheme.value
        h13: Tensor = ops.expert_linear(
            x[:, None],
            topk_ids,
            parameter(layer, "w13_codes"),
            parameter(layer, "w13_scale"),
            layer._parameters.get("w13_group_scale"),
            layer._parameters.get("w13_bias"),
            scheme,
            self._parts,
            backend,
        )
        h = self._gate(h13.flatten(0, 1)).view(*topk_ids.shape, self._intermediate)
        y: Tensor = ops.expert_linear(
            h,
            topk_ids,
            parameter(layer, "w2_codes"),
            parameter(layer, "w2_scale"),
            layer._parameters.get("w2_group_scale"),
            layer._parameters.get("w2_bias"),
            scheme,
            1,
            backend,
        )
        if self._after is not None:
            y = self._after(y.flatten(0, 1)).view(y.shape)
        local = (topk_ids >= 0) & (topk_ids < parameter(layer, "w2_codes").shape[0])
        weighted = y.float() * topk_weights.float()[..., None]
        return torch.where(local[..., None], weighted, 0).sum(1).to(x.dtype)

    def _ready(
        self, expert: int, projection: Projection, place: Place, device: torch.device
    ) -> tuple[Place, ...]:
        """What can be quantized now that this, which goes to `device`, has arrived."""
        return (place,)

    def _are_local_rows(self, projection: Projection, weight: Span) -> bool:
        """Of gate or up, where only they were read: they need to know nothing of the others."""
        if projection == "down" or self.scheme.granularity is Granularity.TENSOR:
            return False
        return weight.shape == (self._intermediate, self._hidden)

    def _local_part(self, projection: Projection, place: Place, device: torch.device) -> Place:
        """Of a whole matrix."""
        channels, grain = self._channels, self.scheme.granularity
        assert channels is not None
        if projection == "down":
            return part_of(place, range(self._hidden), channels, grain, device)
        if grain is Granularity.TENSOR:
            return part_of(place, channels, range(self._hidden), grain, device)
        rows = place.weight.rows(channels.start, len(channels))
        return place._replace(weight=rows, name=f"{place.name}, from row {channels.start}")

    def _strides(self, projection: Projection) -> tuple[tuple[int, int], int, int, int, int]:
        """Of one projection: the shape [N, K] that arrives; from expert to expert, and from an
        expert's first to this one's: elements of the layer's codes, and of its scales."""
        down = projection == "down"
        n, k = (self._hidden, self._intermediate) if down else (self._intermediate, self._hidden)
        scales = math.prod(scale_shape(self.scheme.granularity, (n, k)))
        codes = n * code_columns(self.scheme, k)
        parts = 1 if down else self._parts
        second = int(projection == "up" and self._is_gated)
        shape = (n, self._all_channels) if down else (self._all_channels, k)
        if self.scheme.granularity is Granularity.TENSOR:  # gate and up share theirs
            return shape, parts * codes, second * codes, scales, 0
        return shape, parts * codes, second * codes, parts * scales, second * scales

    def _rows(self, projection: Projection) -> slice:
        """Rows of w13 that belong to a projection."""
        start = self._intermediate if projection == "up" and self._is_gated else 0
        return slice(start, start + self._intermediate)

    def _arrives(self, expert: int, what: str, name: str) -> bool:
        """Whether a tensor is wanted here. Raises for one that cannot be or came before."""
        if not 0 <= expert < self._num_experts:
            raise CheckpointError(
                f"{name}: expert {expert} of a layer that has {self._num_experts}"
            )
        if expert not in self._local:
            return False
        if (expert, what) not in self._waiting:
            raise CheckpointError(f"{name}: {what} of expert {expert} arrived before or is not due")
        return True

    def _parameter_names(self, layer: nn.Module) -> list[str]:
        kinds = ("codes", "scale", "group_scale", "bias")
        ours = [f"{name}_{kind}" for name in ("w13", "w2") for kind in kinds]
        return [name for name in ours if name in layer._parameters]
