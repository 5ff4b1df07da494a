"""`Span`: a tensor inside a larger one, that need not be made to say where it is.

Making a view costs microseconds and gives up Python's lock; a checkpoint has tens of thousands.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor


class Span(NamedTuple):
    """Consecutive elements, seen in a shape.

    Attributes:
        base: contiguous, of any shape.
        at: the element of it where this begins.
        shape: row-major.
    """

    base: Tensor
    at: int
    shape: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> Span:
        """All of a tensor; a copy where it is not contiguous."""
        return cls(tensor.contiguous(), 0, tuple(tensor.shape))

    def tensor(self) -> Tensor:
        """As a view of `base`."""
        flat = self.base.view(-1)[self.at : self.at + math.prod(self.shape)]
        return flat.view(self.shape)

    def rows(self, first: int, count: int) -> Span:
        """Some of the rows."""
        _, *rest = self.shape
        return Span(self.base, self.at + first * math.prod(rest), (count, *rest))

    def halves(self) -> tuple[Span, Span]:
        """The first and the second half of the rows."""
        half = self.shape[0] // 2
        return self.rows(0, half), self.rows(half, half)
