"""Numbers with intervals: the bootstrap, over runs of tokens.

Neighbouring tokens are alike, so single ones must not be drawn as if they were independent: drawn
with replacement are runs of 64 (a block bootstrap: Künsch 1989). The interval is that of the 2.5th
and 97.5th percentile of the statistic over the draws. Of a maximum no such interval bounds what
other text would show; it says how much hangs on a few runs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

RUN = 64
"""Tokens that are drawn together."""

_DRAWS = 400

Values = NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """A statistic, and where 95 % of its bootstrap draws lie."""

    value: float
    low: float
    high: float


def interval(values: Values, statistic: Callable[[Values], Any]) -> Interval:
    """A statistic of a text's tokens.

    Args:
        values: [..., N], a number, or several, for each of N tokens in the text's order.
        statistic: [..., N'] -> [], of any number of tokens.
    """
    n = values.shape[-1]
    assert n, "no tokens"
    starts = np.arange(0, n, RUN)
    runs = [values[..., start : start + RUN] for start in starts]
    generator = np.random.default_rng(0)  # the same text has the same interval
    draws = [
        float(statistic(np.concatenate([runs[i] for i in chosen], axis=-1)))
        for chosen in generator.integers(len(runs), size=(_DRAWS, len(runs)))
    ]
    low, high = np.percentile(draws, [2.5, 97.5])
    return Interval(float(statistic(values)), float(low), float(high))


@dataclass(frozen=True)
class Spread:
    """What a distribution over tokens looks like."""

    mean: Interval
    median: Interval
    p99: Interval
    max: Interval


def spread(values: Values) -> Spread:
    """Of one number a token [N]."""
    return Spread(
        mean=interval(values, np.mean),
        median=interval(values, np.median),
        p99=interval(values, lambda drawn: np.percentile(drawn, 99)),
        max=interval(values, np.max),
    )


def perplexity(log_likelihoods: Values) -> Interval:
    """exp of the mean negative log-likelihood of tokens [N]."""
    return interval(log_likelihoods, lambda drawn: np.exp(-np.mean(drawn)))


def perplexity_ratio(ours: Values, theirs: Values) -> Interval:
    """Of two models on the same tokens [N]; drawn together, so that what the tokens themselves vary
    by does not count."""
    both = np.stack([ours, theirs])
    return interval(both, lambda drawn: np.exp(np.mean(drawn[1]) - np.mean(drawn[0])))
