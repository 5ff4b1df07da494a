"""`--quantization auto` of `moeq plan`: a scheme for every layer, chosen and told about."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moeq.cli.schemes import quiet_transformers

if TYPE_CHECKING:
    from moeq.config import OnlineQuantizationConfig
    from moeq.engines.choose import Mixture

_TEXT_TOKENS = 4096
"""Enough to judge single layers by: their errors vary little from text to text."""


def choose_schemes(
    model: str,
    configs: dict[str, OnlineQuantizationConfig],
    context: int,
    place: dict[str, Any],
    text: Path | None,
    out: Path | None,
) -> Mixture:
    """What `auto` stands for where there is so much memory, written to `out`."""
    import torch

    from moeq.checkpoint.hub import resolve_model
    from moeq.cli.output import check_writable, write_text
    from moeq.cli.progress import bytes_bar
    from moeq.cli.text import ids_of
    from moeq.engines.choose import choose_mixture, output_errors, weight_errors

    quiet_transformers()
    if out is not None:
        check_writable(out, "--out")
    folder = resolve_model(model)
    here = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with bytes_bar(f"measuring {folder.name}") as progress:
        if text is None:
            errors = weight_errors(folder, configs, here, progress)
        else:
            _, ids = ids_of(folder, text, _TEXT_TOKENS)
            errors = output_errors(folder, configs, ids, here, progress)
    chosen = choose_mixture(
        folder,
        configs,
        errors,
        memory=place["bytes"],
        context=context,
        device=torch.device(place["kind"]),
    )
    if out is not None:
        write_text(out, json.dumps(chosen.config.to_dict(), indent=2) + "\n")
    return chosen


def describe(chosen: Mixture, text: Path | None) -> dict[str, Any]:
    """For JSON."""
    return {
        "quantization": chosen.config.to_dict(),
        "error": chosen.error,
        "judged_by": "weights" if text is None else text.name,
        "layers": {
            name: {
                "scheme": None if option.scheme is None else option.scheme.value,
                "bytes": option.nbytes,
                "error": option.error,
            }
            for name, option in chosen.choice.items()
        },
    }


def lines_about(chosen: dict[str, Any] | None) -> list[str]:
    """For a person; nothing where nothing was chosen."""
    if chosen is None:
        return []
    by_scheme: dict[str, list[str]] = {}
    for name, layer in chosen["layers"].items():
        by_scheme.setdefault(layer["scheme"] or "as it is", []).append(name)
    lines = [f"chosen by {chosen['judged_by']}, least error {chosen['error']:.4f}:"]
    for scheme, names in by_scheme.items():
        more = f" + {len(names) - 1} more" if len(names) > 1 else ""
        lines.append(f"  {scheme}: {names[0]}{more}")
    return lines
