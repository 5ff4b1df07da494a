"""`moeq demo`: the embedded model in bf16 and under every scheme, side by side.

Each load runs in a process of its own, so that its peak memory is its own.
"""

from __future__ import annotations

import json
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import click

_BASELINE = "bf16"
_NEW_TOKENS = 48


@click.command(epilog="Example: moeq demo --json > demo.json")
@click.option(
    "--tokens",
    type=click.IntRange(64),
    default=8192,
    show_default=True,
    help="Held-out tokens to score; there are about 27,800.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def demo(tokens: int, as_json: bool) -> None:
    """Load the embedded model under every scheme; print memory, perplexity and a completion.

    Needs no network: an 8-million-parameter Mixture-of-Experts model of Python source ships with
    moeq.
    """
    from moeq.schemes import OnlineQuantScheme

    rows = []
    spawn = multiprocessing.get_context("spawn")
    for name in (_BASELINE, *(scheme.value for scheme in OnlineQuantScheme)):
        click.echo(f"{name} ...", err=True)
        with ProcessPoolExecutor(max_workers=1, mp_context=spawn) as pool:
            rows.append(pool.submit(measure, name, tokens).result())
    for row in rows:
        row["perplexity_change"] = row["perplexity"] / rows[0]["perplexity"] - 1
    if as_json:
        click.echo(json.dumps(rows, indent=2))
    else:
        _print(rows)


def measure(name: str, tokens: int) -> dict[str, Any]:
    """Load the embedded model as "bf16" or under a scheme, score held-out text, complete a prompt.

    Returns:
        scheme, expert_bytes, total_bytes, peak_bytes (None where it cannot be read), load_seconds,
        perplexity, tokens, completion.
    """
    import torch

    from moeq.cli.schemes import quiet_transformers
    from moeq.embedded import PROMPT, held_out_text, model_folder
    from moeq.engines.load import load_tokenizer
    from moeq.fidelity import perplexity

    quiet_transformers()
    # First of all: what was freed before it would be used again, and missing from its peak
    model, sizes = _load_plain() if name == _BASELINE else _load_quantized(name)
    tokenizer = load_tokenizer(model_folder())
    ids = tokenizer(held_out_text(), return_tensors="pt", verbose=False)["input_ids"][0][:tokens]
    prompt = tokenizer(PROMPT, return_tensors="pt")
    with torch.inference_mode():
        output = model.generate(**prompt, max_new_tokens=_NEW_TOKENS, do_sample=False)
    return {
        "scheme": name,
        **sizes,
        "perplexity": perplexity(model, ids),
        "tokens": len(ids),
        "completion": tokenizer.decode(output[0], skip_special_tokens=True),
    }


def _load_quantized(name: str) -> tuple[Any, dict[str, Any]]:
    from moeq.embedded import model_folder
    from moeq.engines.load import load, report_of

    model = load(model_folder(), name)
    report = report_of(model)
    return model, {
        "expert_bytes": report.expert_bytes_after,
        "total_bytes": report.total_bytes_after,
        "peak_bytes": report.peak_bytes_actual,
        "load_seconds": report.seconds,
    }


def _load_plain() -> tuple[Any, dict[str, Any]]:
    """The baseline is transformers by itself."""
    import torch
    from transformers import AutoModelForCausalLM

    from moeq.embedded import model_folder
    from moeq.memory import PeakMemory

    started = time.perf_counter()
    with PeakMemory() as memory:
        model = AutoModelForCausalLM.from_pretrained(model_folder(), dtype=torch.bfloat16)
    seconds = time.perf_counter() - started
    sizes = {name: p.numel() * p.element_size() for name, p in model.named_parameters()}
    return model, {
        "expert_bytes": sum(size for name, size in sizes.items() if ".experts." in name),
        "total_bytes": sum(sizes.values()),
        "peak_bytes": memory.peak_bytes,
        "load_seconds": seconds,
    }


def _print(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    from moeq.report import size

    # Narrow enough for 80 columns, cut nowhere when piped into a file
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("scheme", no_wrap=True)
    for heading in ("experts", "weights", "peak", "load", "perplexity", "change"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        peak = row["peak_bytes"]
        table.add_row(
            row["scheme"],
            size(row["expert_bytes"]),
            size(row["total_bytes"]),
            "-" if peak is None else size(peak),
            f"{row['load_seconds']:.2f} s",
            f"{row['perplexity']:.3f}",
            "" if row is rows[0] else f"{row['perplexity_change']:+.2%}",
        )
    console = Console()
    for row in rows:
        console.print(f"[bold]{row['scheme']}[/bold]")
        console.print(row["completion"], markup=False, highlight=False)
        console.print()
    console.print(table)
    console.print(
        f"\nperplexity: over {rows[0]['tokens']} tokens that the model never saw\n"
        "peak: anonymous memory that loading took, in a fresh process\n"
        "fp8 weights meet unquantized activations here: CPUs have no fp8 units",
        highlight=False,
    )
