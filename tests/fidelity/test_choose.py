"""Choosing schemes, against every choice there is."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeq.fidelity.choose import Choice, Option, choose, total_bytes, total_error
from moeq.schemes import OnlineQuantScheme

SCHEMES = (None, *OnlineQuantScheme)

layers = st.lists(
    st.lists(
        st.builds(lambda n, e: (n, e / 8), st.integers(1, 60), st.integers(0, 40)),
        min_size=1,
        max_size=4,
    ),
    min_size=1,
    max_size=4,
)


def options_of(sizes: list[list[tuple[int, float]]]) -> dict[str, list[Option]]:
    return {
        f"layer {index}": [Option(SCHEMES[i], n, e) for i, (n, e) in enumerate(some)]
        for index, some in enumerate(sizes)
    }


def every_choice(options: dict[str, list[Option]]) -> list[Choice]:
    return [dict(zip(options, some)) for some in itertools.product(*options.values())]


@given(layers, st.integers(0, 250))
def test_fits_where_anything_does_and_is_near_the_best(
    sizes: list[list[tuple[int, float]]], budget: int
) -> None:
    """The hull misses the best choice by at most one step of one layer."""
    options = options_of(sizes)
    fitting = [choice for choice in every_choice(options) if total_bytes(choice) <= budget]
    found = choose(options, budget)
    if not fitting:
        assert found is None
        return
    assert found is not None
    assert found.keys() == options.keys()
    assert total_bytes(found) <= budget
    best = min(total_error(choice) ** 2 for choice in fitting)
    step = max(max(o.error for o in some) ** 2 for some in options.values())
    assert best <= total_error(found) ** 2 <= best + step + 1e-9


@given(layers, st.integers(0, 250))
def test_is_never_worse_than_one_scheme_for_all(
    sizes: list[list[tuple[int, float]]], budget: int
) -> None:
    options = options_of(sizes)
    found = choose(options, budget)
    for scheme in SCHEMES:
        uniform = {
            name: next(o for o in some if o.scheme is scheme)
            for name, some in options.items()
            if any(o.scheme is scheme for o in some)
        }
        if uniform.keys() == options.keys() and total_bytes(uniform) <= budget:
            assert found is not None
            assert total_error(found) <= total_error(uniform) + 1e-12


def test_more_bytes_go_where_they_gain_most() -> None:
    options = {
        "a": [Option(None, 20, 0.0), Option(SCHEMES[1], 10, 1.0)],
        "b": [Option(None, 20, 0.0), Option(SCHEMES[1], 10, 3.0)],
    }
    found = choose(options, 30)
    assert found is not None
    assert {name: option.scheme for name, option in found.items()} == {"a": SCHEMES[1], "b": None}


def test_of_equals_the_first() -> None:
    options = {"a": [Option(SCHEMES[1], 10, 1.0), Option(SCHEMES[5], 10, 1.0)]}
    found = choose(options, 10)
    assert found is not None
    assert found["a"].scheme is SCHEMES[1]


@pytest.mark.parametrize("budget", [-1, 0, 9])
def test_nothing_fits(budget: int) -> None:
    assert choose({"a": [Option(None, 10, 0.0)]}, budget) is None
