"""A function that vLLM sends to its ranks, which import it by this module's name."""

from __future__ import annotations

import hashlib
from typing import Any


def digests(model: Any) -> dict[str, str]:
    """SHA-256 of what moeq's methods hold, by parameter, in the order of files."""
    import torch

    methods = [(m, m.quant_method) for m in model.modules() if hasattr(m, "quant_method")]
    ours = [(layer, method._method) for layer, method in methods if hasattr(method, "_method")]
    for layer, method in ours:
        method.restore(layer)
    found = {
        name: hashlib.sha256(
            parameter.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
        ).hexdigest()
        for name, parameter in model.named_parameters()
        if name.endswith(("_codes", "_scale"))
    }
    for layer, method in ours:
        method.arrange(layer)
    return found
