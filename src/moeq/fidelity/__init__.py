"""What quantization costs, in numbers. So far: perplexity."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def perplexity(model: Any, ids: Tensor, *, window: int = 2048, batch: int = 1) -> float:
    """exp of the mean negative log-likelihood of a text under a causal language model.

    The text is cut into windows that do not overlap; within each, every token but the first is
    scored given those before it. Log-likelihoods are computed and added in fp32.

    Args:
        model: a transformers causal language model.
        ids: token ids [N], N > 1.
        window: tokens per window.
        batch: windows per forward pass; does not change what is computed.
    """
    pieces = [ids[i : i + window] for i in range(0, len(ids), window)]
    full = [piece for piece in pieces if len(piece) == window]
    batches = [torch.stack(full[i : i + batch]) for i in range(0, len(full), batch)]
    batches += [piece[None] for piece in pieces if 1 < len(piece) < window]
    total, count = 0.0, 0
    with torch.inference_mode():
        for rows in batches:
            logits = model(rows.to(model.device)).logits[:, :-1].float()
            scored = rows[:, 1:].to(logits.device)
            total += F.cross_entropy(logits.flatten(0, 1), scored.flatten(), reduction="sum").item()
            count += scored.numel()
    return math.exp(total / count)
