"""`moeq backends`: what runs where, and why not."""

from __future__ import annotations

import json
from typing import Any

import click


@click.command(epilog="Example: moeq backends --device cpu --json")
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda, cuda:1, ...")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def backends(device: str, as_json: bool) -> None:
    """Show which kernel runs each scheme on a device, and why the others do not."""
    rows = _rows(device)
    if as_json:
        click.echo(json.dumps(rows, indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table(title=f"kernels on {device}, bfloat16 activations", title_justify="left")
    for heading in ("scheme", "experts", "linears"):
        table.add_column(heading, no_wrap=True)
    remarks: list[str] = []
    for scheme in dict.fromkeys(row["scheme"] for row in rows):
        cells = {row["kind"]: _cell(row, remarks) for row in rows if row["scheme"] == scheme}
        table.add_row(scheme, *(cells.get(kind, "not covered") for kind in ("moe", "linear")))
    console.print(table)
    for number, remark in enumerate(remarks, 1):
        console.print(f"{number}  {remark}", highlight=False, soft_wrap=True)


def _cell(row: dict[str, Any], remarks: list[str]) -> str:
    """The winner and what it does differently, or why there is none, by number of the remark."""
    mine = [row["note"]] if row["note"] else []
    if not row["backend"]:
        mine += [f"{name}: {reason}" for name, reason in row["rejected"].items()]
    remarks += [remark for remark in mine if remark not in remarks]
    numbers = ", ".join(str(remarks.index(remark) + 1) for remark in mine)
    return f"{row['backend'] or 'nothing'} ({numbers})" if numbers else str(row["backend"])


def _rows(device: str) -> list[dict[str, Any]]:
    import torch

    from moeq.errors import ConfigError
    from moeq.oracle import BACKENDS, KernelRequest
    from moeq.schemes import LAYER_KINDS, OnlineQuantScheme

    try:
        where = torch.device(device)
    except RuntimeError:
        raise ConfigError(f"unknown device {device!r}", hint="cpu, cuda, cuda:1, ...") from None
    rows = []
    for scheme in OnlineQuantScheme:
        for kind in LAYER_KINDS:
            if not scheme.covers(kind):
                continue
            request = KernelRequest(kind, scheme, where, torch.bfloat16)
            verdicts = {b.name: b.rejects(request, False) for b in BACKENDS}
            winner = next((b for b in BACKENDS if not verdicts[b.name]), None)
            rows.append(
                {
                    "scheme": scheme.value,
                    "kind": kind,
                    "backend": winner.name if winner else None,
                    "note": winner.note(request) if winner else "",
                    "rejected": {name: why for name, why in verdicts.items() if why},
                }
            )
    return rows
