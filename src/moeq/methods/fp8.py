"""fp8 (e4m3fn) experts, by what shares a scale."""

from __future__ import annotations

import copy as copy_module
import threading
from typing import Any, ClassVar

import torch

from moeq.methods.base import OnlineMoEMethodBase, Projection
from moeq.methods.matrices import Place
from moeq.schemes import OnlineQuantScheme
from moeq.span import Span


class Fp8PerChannelOnlineMoEMethod(OnlineMoEMethodBase):
    """One scale per output row."""

    scheme: ClassVar[OnlineQuantScheme] = OnlineQuantScheme.FP8_PER_CHANNEL


class Fp8PerBlockOnlineMoEMethod(OnlineMoEMethodBase):
    """One scale per 128 x 128 block; gate and up have grids of their own."""

    scheme: ClassVar[OnlineQuantScheme] = OnlineQuantScheme.FP8_PER_BLOCK


class Fp8PerTensorOnlineMoEMethod(OnlineMoEMethodBase):
    """One scale per matrix. Gate and up are one matrix to a fused kernel, so they share theirs.

    The first of the two to arrive waits, unquantized, for the other: the one place where more than
    one projection is in flight. Checkpoints store them side by side, so it is one pair at a time.
    """

    scheme: ClassVar[OnlineQuantScheme] = OnlineQuantScheme.FP8_PER_TENSOR

    def __init__(self, *, backend: str | None = None) -> None:
        super().__init__(backend=backend)
        self._first: dict[int, tuple[Place, Any]] = {}
        self._pairing = threading.Lock()

    def _ready(
        self, expert: int, projection: Projection, place: Place, device: torch.device
    ) -> tuple[Place, ...]:
        if projection == "down" or not self._is_gated:
            return (place,)
        # On a GPU the other may be another stream's work, and its memory another stream's too
        on_gpu = device.type == "cuda"
        with self._pairing:
            if expert not in self._first:
                copy = place.weight.tensor().to(device).clone()
                done = torch.cuda.current_stream().record_event() if on_gpu else None
                self._first[expert] = (place._replace(weight=Span.of(copy)), done)
                return ()
            other, done = self._first.pop(expert)
        if done is not None:
            torch.cuda.current_stream().wait_event(done)
            other.weight.base.record_stream(torch.cuda.current_stream())
        return other, place

    def expect_nothing(self) -> None:
        super().expect_nothing()
        self._first.clear()

    def __deepcopy__(self, memo: dict[int, Any]) -> Fp8PerTensorOnlineMoEMethod:
        twin = copy_module.copy(self)
        memo[id(self)] = twin
        state = {name: value for name, value in vars(self).items() if name != "_pairing"}
        vars(twin).update(copy_module.deepcopy(state, memo))
        twin._pairing = threading.Lock()
        return twin
