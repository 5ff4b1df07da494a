"""Divergence and likelihoods, against PyTorch's own losses in fp64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from moeq.fidelity import divergence as module
from moeq.fidelity.divergence import divergence, log_likelihoods

T, V = 37, 501


def some_logits(seed: int) -> torch.Tensor:
    return torch.randn(T, V, generator=torch.Generator().manual_seed(seed)) * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("elements", [V // 2, 5 * V, 1 << 21])
def test_is_the_divergence(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, elements: int
) -> None:
    monkeypatch.setattr(module, "_ELEMENTS", elements)
    theirs, ours = some_logits(0).to(dtype), (some_logits(0) + 0.1 * some_logits(1)).to(dtype)
    log_p, log_q = (x.double().log_softmax(-1) for x in (theirs, ours))
    expected = F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)
    found = divergence(theirs, ours)
    assert torch.allclose(found.kl, expected, rtol=1e-12, atol=1e-15)
    assert expected.min() > 1e-3
    assert torch.equal(found.agrees, theirs.argmax(-1) == ours.argmax(-1))
    ids = torch.arange(T)
    expected = -F.cross_entropy(ours.double(), ids, reduction="none")
    assert torch.allclose(log_likelihoods(ours, ids), expected, rtol=1e-12)


def test_of_a_distribution_from_itself_is_nothing() -> None:
    found = divergence(some_logits(0), some_logits(0) + 3.0)  # a constant changes no probability
    assert found.kl.max() < 1e-12
    assert found.kl.min() >= 0
    assert bool(found.agrees.all())


def test_small_ones_are_not_lost() -> None:
    """Half the sum of p * dx^2 to second order; fp32 would round such sums away."""
    theirs = some_logits(0).double()
    dx = 1e-5 * some_logits(1).double()
    p = theirs.softmax(-1)
    expected = 0.5 * ((p * dx**2).sum(-1) - (p * dx).sum(-1) ** 2)
    found = divergence(theirs, theirs + dx).kl
    assert torch.allclose(found, expected, rtol=1e-3, atol=1e-15)


def test_what_is_impossible_adds_nothing() -> None:
    """Some models mask ids that their tokenizer does not have."""
    theirs, ours = some_logits(0), some_logits(1)
    expected = divergence(theirs[:, 5:], ours[:, 5:]).kl
    theirs[:, :5] = ours[:, :5] = -torch.inf
    assert torch.allclose(divergence(theirs, ours).kl, expected)
