"""`moeq eval`: what schemes cost in quality, measured."""

from __future__ import annotations

import datetime
import json
import shlex
import sys
from pathlib import Path
from typing import Any

import click

from moeq.cli.schemes import configs_of, quiet_transformers, refinement_options

_EPILOG = """\b
Examples:
  moeq eval ./model --text wiki.txt
  moeq eval ./model -q int8_per_channel_weight_only,fp8_per_block --text wiki.txt --tokens 32768
  moeq eval ./model -q mixture.json --text wiki.txt --report report.html
"""


@click.command("eval", epilog=_EPILOG)
@click.argument("model")
@click.option(
    "--quantization",
    "-q",
    help="Schemes, or configs in FILE.json, with commas between; all schemes where absent.",
)
@refinement_options
@click.option(
    "--text",
    type=click.Path(path_type=Path),
    help="UTF-8 text to compare on; the embedded model has its own.",
)
@click.option(
    "--tokens",
    type=click.IntRange(512),
    default=8192,
    show_default=True,
    help="Of the text, at most; in windows of 512.",
)
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda, cuda:1, ...")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option(
    "--report",
    type=click.Path(path_type=Path),
    metavar="FILE.html",
    help="Write a page with tables and figures; loads the model once under each scheme.",
)
def evaluate(
    model: str,
    quantization: str | None,
    text: Path | None,
    tokens: int,
    device: str,
    as_json: bool,
    report: Path | None,
    **refinements: Any,
) -> None:
    """Compare MODEL under schemes with the original, on a text: divergence, agreement, perplexity.

    Reads the original a layer at a time, once for all schemes, and never holds a whole model; it
    works where only the quantized model would fit.
    """
    from moeq.checkpoint.hub import resolve_model
    from moeq.cli.output import check_writable, write_text
    from moeq.cli.progress import bytes_bar
    from moeq.cli.text import ids_of
    from moeq.engines.evaluate import evaluate as evaluate_model
    from moeq.errors import ConfigError
    from moeq.fidelity.result import finite

    configs = configs_of(quantization=quantization, **refinements)
    if report is not None:
        check_writable(report, "--report")
        if text is not None and text.exists() and report.exists() and report.samefile(text):
            raise ConfigError(f"--report {report} is the text", hint="name another file")
    quiet_transformers()
    folder = resolve_model(model)
    source, ids = ids_of(folder, text, tokens)
    with bytes_bar(f"evaluating {folder.name}") as progress:
        found = evaluate_model(folder, configs, ids, device=device, progress=progress)
    result = _with_origin(found.to_dict(), model, device, source)
    if report is not None:
        from moeq.cli.timeline import timeline_of
        from moeq.fidelity.page import render

        for scheme in result["schemes"]:
            click.echo(f"loading under {scheme['scheme']} ...", err=True)
            scheme["load"] = timeline_of(folder, scheme["quantization"], device)
        write_text(report, render(result))
        click.echo(f"report: {report}", err=True)
    if as_json:
        click.echo(json.dumps(finite(result), indent=2, allow_nan=False))
    else:
        _print(result)


def _with_origin(result: dict[str, Any], model: str, device: str, source: str) -> dict[str, Any]:
    """What else a reader of the numbers has to know."""
    import platform

    import torch
    import transformers

    from moeq import __version__

    result["text"]["source"] = source
    return {
        "moeq": __version__,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "command": shlex.join(["moeq", *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "model": model,
        "device": device,
        **result,
    }


def _print(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    from moeq.cli.output import printable
    from moeq.report import size

    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("scheme", no_wrap=True)
    for heading in ("weights", "KL", "95 % interval", "p99", "top-1", "router", "ppl", "change"):
        table.add_column(heading, justify="right", no_wrap=True)
    noise, reference = result["noise_floor"], result["reference"]
    table.add_row("original", size(reference["bytes"]), *_cells(noise, reference["perplexity"]))
    for row in result["schemes"]:
        table.add_row(printable(row["scheme"]), size(row["bytes"]), *_cells(row, row["perplexity"]))
    text = result["text"]
    console = Console(width=None if sys.stdout.isatty() else 200)
    console.print(table)
    lines = [
        "",
        f"over {text['scored']} tokens of {text['source']}, windows of {text['window']}",
        "KL: mean divergence of next-token distributions from the original's, nats; p99: of tokens",
        "top-1: same likeliest token; router: same experts chosen; ppl: perplexity",
        "original: against itself, two windows at a time and another order of sums",
    ]
    for row in result["schemes"]:
        lines += [f"note: {row['scheme']}: {note}" for note in row["notes"]]
        for each in row["outliers"][:3]:
            where = each["layer"] + ("" if each["expert"] is None else f" expert {each['expert']}")
            lines.append(
                f"outlier: {row['scheme']}: {where}: {each['what']} {each['value']:.3g},"
                f" its like {each['typical']:.3g}"
            )
    for line in lines:
        console.print(printable(line), highlight=False, markup=False)


def _cells(found: dict[str, Any], perplexity: dict[str, float]) -> list[str]:
    mean, router = found["kl"]["mean"], found["router_agreement"]
    return [
        f"{mean['value']:.2e}",
        f"{mean['low']:.1e} to {mean['high']:.1e}",
        f"{found['kl']['p99']['value']:.1e}",
        f"{found['top1_agreement']['value']:.2%}",
        "-" if router is None else f"{router['value']:.2%}",
        f"{perplexity['value']:.3f}",
        f"{found['perplexity_ratio']['value'] - 1:+.2%}",
    ]
