"""Which scheme for which layer, so that the whole fits and the error is least.

Each layer has options, of so many bytes and with such an error; a choice takes one of each. Errors
of layers are relative and about independent, so that their squares add up. What is sought is the
choice of the least sum that fits: a multiple-choice knapsack. Walked is the lower convex hull of
every layer's (bytes, error²) from the cheapest option upwards, always by the step that gains most
for its bytes (Sinha and Zoltners 1979); what room is left at the end goes to single steps that fit.
Uniform choices compete as well, so that a mixture is never worse than a scheme for all.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from moeq.schemes import OnlineQuantScheme


@dataclass(frozen=True)
class Option:
    """One way to hold one layer.

    Attributes:
        scheme: None as it is in the checkpoint.
        nbytes: that it takes.
        error: relative, 0 or more.
    """

    scheme: OnlineQuantScheme | None
    nbytes: int
    error: float


Choice = dict[str, Option]


def choose(options: Mapping[str, Sequence[Option]], budget: int) -> Choice | None:
    """The least sum of squared errors in at most `budget` bytes; None where nothing fits.

    Args:
        options: of each layer, one at least.
        budget: bytes of all layers together.
    """
    candidates = [
        choice for choice in _candidates(options, budget) if total_bytes(choice) <= budget
    ]
    return min(candidates, key=lambda c: (total_error(c), total_bytes(c)), default=None)


def total_bytes(choice: Choice) -> int:
    return sum(option.nbytes for option in choice.values())


def total_error(choice: Choice) -> float:
    """Root of the summed squares."""
    return float(sum(option.error**2 for option in choice.values()) ** 0.5)


def _candidates(options: Mapping[str, Sequence[Option]], budget: int) -> Iterable[Choice]:
    yield _mixture(options, budget)
    schemes = {option.scheme for some in options.values() for option in some}
    for scheme in schemes:
        yield {
            layer: next((o for o in some if o.scheme is scheme), _least(some))
            for layer, some in options.items()
        }


def _mixture(options: Mapping[str, Sequence[Option]], budget: int) -> Choice:
    hulls = {layer: _hull(some) for layer, some in options.items()}
    choice = {layer: hull[0] for layer, hull in hulls.items()}
    room = budget - total_bytes(choice)
    steps: list[tuple[float, str, int]] = []
    for layer, hull in hulls.items():
        _push(steps, layer, hull, 0)
    while steps:
        _, layer, index = heapq.heappop(steps)
        hull = hulls[layer]
        cost = hull[index + 1].nbytes - hull[index].nbytes
        if cost <= room:
            choice[layer] = hull[index + 1]
            room -= cost
            _push(steps, layer, hull, index + 1)
    return choice


def _push(steps: list[tuple[float, str, int]], layer: str, hull: list[Option], index: int) -> None:
    if index + 1 < len(hull):
        here, there = hull[index], hull[index + 1]
        gain = (here.error**2 - there.error**2) / (there.nbytes - here.nbytes)
        heapq.heappush(steps, (-gain, layer, index))


def _hull(options: Sequence[Option]) -> list[Option]:
    """From the fewest bytes to the least error, each step with a smaller gain for its bytes."""
    hull: list[Option] = []
    for option in sorted(options, key=lambda o: (o.nbytes, o.error)):
        if hull and option.error >= hull[-1].error:
            continue
        while len(hull) > 1 and not _is_convex(hull[-2], hull[-1], option):
            hull.pop()
        hull.append(option)
    return hull


def _is_convex(first: Option, middle: Option, last: Option) -> bool:
    before = (first.error**2 - middle.error**2) * (last.nbytes - middle.nbytes)
    after = (middle.error**2 - last.error**2) * (middle.nbytes - first.nbytes)
    return before > after


def _least(options: Sequence[Option]) -> Option:
    """As it is in the checkpoint, for a layer that a scheme does not cover."""
    return min(options, key=lambda option: option.error)
