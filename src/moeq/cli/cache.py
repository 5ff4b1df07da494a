"""`moeq cache`: quantized models that `--cache` keeps."""

from __future__ import annotations

import dataclasses
import json
import time

import click


@click.group(epilog="Examples:  moeq cache list  |  moeq cache clear")
def cache() -> None:
    """Quantized models that were kept for the next time (folder: MOEQ_CACHE, or ~/.cache/moeq)."""


@cache.command("list", epilog="Example: moeq cache list --json")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def list_entries(as_json: bool) -> None:
    """Show what is kept, and how large it is."""
    from moeq.checkpoint.cache import cache_folder, entries
    from moeq.report import size

    found = entries()
    if as_json:
        rows = [dataclasses.asdict(entry) for entry in found]
        click.echo(json.dumps({"folder": str(cache_folder()), "entries": rows}, indent=2))
        return
    for entry in found:
        day = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.modified))
        remark = "  damaged, set aside" if entry.is_damaged else ""
        click.echo(f"{size(entry.nbytes):>9}  {day}  {entry.name}{remark}")
    total = sum(entry.nbytes for entry in found)
    click.echo(f"{len(found)} in {cache_folder()}, {size(total)}")


@cache.command(epilog="Example: moeq cache clear Qwen3-30B-A3B.0123456789abcdef")
@click.argument("names", nargs=-1, metavar="[ENTRY]...")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def clear(names: tuple[str, ...], as_json: bool) -> None:
    """Remove entries; all of them where none is named. What is being made just now stays."""
    from moeq.checkpoint.cache import clear
    from moeq.report import size

    removed = clear(list(names))
    if as_json:
        rows = [dataclasses.asdict(entry) for entry in removed]
        click.echo(json.dumps({"removed": rows}, indent=2))
        return
    click.echo(f"{len(removed)} removed, {size(sum(entry.nbytes for entry in removed))}")
