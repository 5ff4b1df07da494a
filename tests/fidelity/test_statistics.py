"""Bootstrap intervals: where they have to lie, and when they may be narrow."""

from __future__ import annotations

import numpy as np
import pytest

from moeq.fidelity.statistics import RUN, interval, perplexity, perplexity_ratio, spread


def normal(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(1.0, 0.5, n)


def test_covers_the_truth_about_as_often_as_it_says() -> None:
    """95 % of 60 texts is 57; fewer than 50 has a probability below 1e-3, and a bootstrap over few
    runs is a little narrow."""
    found = [interval(normal(64 * RUN, seed), np.mean) for seed in range(60)]
    hits = sum(each.low <= 1.0 <= each.high for each in found)
    assert 50 <= hits < 60


def test_is_as_wide_as_the_error_of_a_mean() -> None:
    found = interval(normal(256 * RUN), np.mean)
    expected = 2 * 1.96 * 0.5 / np.sqrt(256 * RUN)
    assert found.high - found.low == pytest.approx(expected, rel=0.3)


def test_tokens_that_are_alike_count_as_one() -> None:
    """Independent draws of them would be 8 times too sure."""
    alike = np.repeat(normal(64), RUN)
    apart = normal(64 * RUN)
    wide, narrow = interval(alike, np.mean), interval(apart, np.mean)
    assert wide.high - wide.low > 4 * (narrow.high - narrow.low)


def test_is_the_same_every_time() -> None:
    assert interval(normal(1000), np.median) == interval(normal(1000), np.median)


def test_one_run_has_no_width() -> None:
    found = interval(normal(RUN), np.mean)
    assert found.low == found.value == found.high


def test_of_a_last_run_that_is_short() -> None:
    values = normal(3 * RUN + 5)
    assert interval(values, np.mean).value == pytest.approx(values.mean())


def test_spread_is_in_order() -> None:
    found = spread(normal(20 * RUN))
    assert found.median.value < found.p99.value < found.max.value == normal(20 * RUN).max()
    for each in (found.mean, found.median, found.p99, found.max):
        assert each.low <= each.value <= each.high


def test_perplexity_and_its_ratio() -> None:
    ours, theirs = -normal(32 * RUN), -normal(32 * RUN) - 0.1
    assert perplexity(ours).value == pytest.approx(np.exp(-ours.mean()))
    found = perplexity_ratio(ours, theirs)
    assert found.value == pytest.approx(np.exp(-0.1))
    # The same tokens: their own spread cancels
    assert found.high - found.low < 1e-12 < perplexity(ours).high - perplexity(ours).low
