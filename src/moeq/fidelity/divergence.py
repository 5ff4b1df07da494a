"""How far one next-token distribution is from another, token by token.

    KL(p || q) = sum over the vocabulary of p * (log p - log q)        nats; p: the original's

Log-softmax and sums are in fp64: what eight bits cost is 1e-4 nats and less, and in fp32 the
normalizer of 150,000 tokens alone is uncertain by 1e-6.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

_ELEMENTS = 1 << 21
"""Logits looked at together; in fp64, a few times, they are tens of MB."""


class Divergence(NamedTuple):
    """Of T tokens.

    Attributes:
        kl: fp64 [T], nats, 0 or more.
        agrees: bool [T], whether both find the same token the likeliest.
    """

    kl: Tensor
    agrees: Tensor


def divergence(reference: Tensor, logits: Tensor) -> Divergence:
    """Of logits [T, V] from those of the original [T, V], any floating dtype; results on the CPU.

    Where logits tie the lower id is the likeliest, as `argmax` has it. What the original finds
    impossible (a logit of -Inf) adds nothing.
    """
    assert reference.shape == logits.shape, (reference.shape, logits.shape)
    kl, agrees = [], []
    for ours, theirs in zip(_rows(logits), _rows(reference), strict=True):
        p, q = theirs.double().log_softmax(-1), ours.double().log_softmax(-1)
        terms = (p.exp() * (p - q)).masked_fill_(p == -torch.inf, 0)
        kl.append(terms.sum(-1).clamp_(min=0).cpu())
        agrees.append((theirs.argmax(-1) == ours.argmax(-1)).cpu())
    return Divergence(torch.cat(kl), torch.cat(agrees))


def log_likelihoods(logits: Tensor, targets: Tensor) -> Tensor:
    """fp64 [T], on the CPU: the log-probability of each target id [T] under logits [T, V]."""
    found = [
        rows.double().log_softmax(-1).gather(-1, ids)[:, 0].cpu()
        for rows, ids in zip(_rows(logits), _rows(targets[:, None], like=logits), strict=True)
    ]
    return torch.cat(found)


def _rows(tensor: Tensor, like: Tensor | None = None) -> Iterator[Tensor]:
    """Some rows at a time of [T, ...]: so many as of `like`."""
    step = max(1, _ELEMENTS // (tensor if like is None else like).shape[-1])
    for start in range(0, len(tensor), step):
        yield tensor[start : start + step]
