"""`moeq plan`: what a model takes, before anything is downloaded or loaded."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from moeq.cli.auto import choose_schemes, describe, lines_about
from moeq.cli.schemes import configs_of, quiet_transformers, refinement_options

if TYPE_CHECKING:
    from moeq.config import OnlineQuantizationConfig

_EPILOG = """\b
Examples:
  moeq plan Qwen/Qwen3-30B-A3B
  moeq plan ./model -q fp8_per_block --context 32768
  moeq plan ./model --memory 24GiB --json
  moeq plan ./model --memory 24GiB --quantization auto --out mixture.json
  moeq generate ./model -q mixture.json --prompt Once
"""

_AUTO = "auto"

_UNITS = {"B": 1} | {
    f"{letter}{suffix}": base**power
    for power, letter in enumerate("KMGT", 1)
    for suffix, base in (("B", 1000), ("iB", 1024))
}


def parse_size(context: Any, option: Any, value: str | None) -> int | None:
    """24GB (24 x 10^9 bytes) or 24GiB (24 x 2^30), as click calls it."""
    if value is None:
        return None
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", value)
    units = {unit.lower(): factor for unit, factor in _UNITS.items()}
    if not found or found[2].lower() not in units:
        raise click.BadParameter(f"{value!r} is no size; write 24GB (10^9 bytes) or 24GiB (2^30)")
    return int(float(found[1]) * units[found[2].lower()])


@click.command(epilog=_EPILOG)
@click.argument("model")
@click.option(
    "--quantization",
    "-q",
    help="Schemes, or configs in FILE.json, with commas between; all schemes where absent. auto"
    " reads the weights and chooses a scheme for every layer.",
)
@refinement_options
@click.option(
    "--context",
    type=click.IntRange(1),
    default=4096,
    show_default=True,
    help="Tokens of the KV cache, batch 1.",
)
@click.option(
    "--memory",
    metavar="SIZE",
    callback=parse_size,
    help="Fit into this much, such as 24GiB, on whatever GPU that is.",
)
@click.option(
    "--text",
    type=click.Path(path_type=Path),
    help="With auto: judge schemes by what layers make of this text, and not by weights alone.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    metavar="FILE.json",
    help="With auto: write the config, which every command takes as --quantization.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def plan(
    model: str,
    quantization: str | None,
    context: int,
    memory: int | None,
    text: Path | None,
    out: Path | None,
    as_json: bool,
    **refinements: Any,
) -> None:
    """Say what MODEL takes under a scheme, or under each: bytes, memory, time, and whether it fits.

    Reads config.json and the headers of the weights; of a model on the Hugging Face hub nothing
    else is downloaded, unless schemes are to be chosen by themselves.
    """
    from moeq.errors import ConfigError

    is_auto = quantization == _AUTO
    configs = configs_of(quantization=None if is_auto else quantization, **refinements)
    chosen = None
    if is_auto:
        place = budgets(memory)[-1]
        chosen = choose_schemes(model, configs, context, place, text, out)
        configs = {_AUTO: chosen.config}
    elif text is not None or out is not None:
        raise ConfigError("--text and --out are for --quantization auto")
    result = make_plan(model, configs, context, memory)
    if chosen is not None:
        result["chosen"] = describe(chosen, text)
    if as_json:
        click.echo(json.dumps(result, indent=2))
    else:
        _print(result)


def make_plan(
    model: str, configs: dict[str, OnlineQuantizationConfig], context: int, memory: int | None
) -> dict[str, Any]:
    """Everything that `moeq plan` prints, as data."""
    import torch

    from moeq.checkpoint.folder import checkpoint_files
    from moeq.checkpoint.hub import is_hub_id, remote_headers, resolve_model
    from moeq.checkpoint.probe import read_rate
    from moeq.checkpoint.published import logical, read_specs
    from moeq.engines.load import check_config, check_folder, empty_model
    from moeq.engines.planning import cache_bytes, plan_load

    quiet_transformers()
    rate = None
    if is_hub_id(model):
        folder, specs = remote_headers(model)
        specs = logical(specs, check_config(folder).get("quantization_config"))
    else:
        folder = resolve_model(model)
        check_folder(folder)
        files = checkpoint_files(folder)
        specs = read_specs(files)
        rate = read_rate(files)
    empty = empty_model(folder)
    places = budgets(memory)
    cache = cache_bytes(empty, context)
    schemes = []
    for name, config in configs.items():
        on_cpu, on_gpu = plan_load(
            empty, specs, config, (torch.device("cpu"), torch.device("cuda"))
        )
        entry: dict[str, Any] = {
            "scheme": name,
            "expert_bytes": on_cpu.final_expert_bytes,
            "linear_bytes": on_cpu.final_linear_bytes,
            "other_bytes": on_cpu.final_bytes
            - on_cpu.final_expert_bytes
            - on_cpu.final_linear_bytes,
            "total_bytes": on_cpu.final_bytes,
            "coverage": on_cpu.coverage,
            "cpu_peak_bytes": on_cpu.peak_bytes,
            "gpu_peak_bytes": on_gpu.peak_bytes,
            "gpu_host_peak_bytes": on_gpu.host_bytes,
            "kept": on_cpu.kept,
            "filled": on_cpu.filled,
            "dropped": on_cpu.dropped,
            "read_seconds": on_cpu.checkpoint_bytes / rate if rate else None,
        }
        entry["fits"] = {
            place["name"]: _need(entry, cache or 0, place["kind"]) <= place["bytes"]
            for place in places
        }
        schemes.append(entry)
    result: dict[str, Any] = {
        "model": model,
        "checkpoint_bytes": sum(spec.nbytes for spec in specs.values()),
        "context": context,
        "cache_bytes": cache,
        "read_bytes_per_second": rate,
        "places": places,
        "schemes": schemes,
    }
    result["advice"] = [
        {"place": place["name"], "advice": advice(result, place)} for place in places
    ]
    return result


def budgets(memory: int | None) -> list[dict[str, Any]]:
    """Where a model could go: each visible GPU, and main memory; or what the user says there is."""
    import torch

    from moeq.memory import available_bytes

    if memory is not None:
        return [{"name": "--memory", "kind": "cuda", "bytes": memory}]
    places: list[dict[str, Any]] = [{"name": "cpu", "kind": "cpu", "bytes": available_bytes()}]
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        free, _ = torch.cuda.mem_get_info(index)
        places.append({"name": f"cuda:{index}", "kind": "cuda", "bytes": free})
    return places


def _need(entry: dict[str, Any], cache: int, kind: str) -> int:
    """The more of loading, and of running with a full cache."""
    peak = entry["cpu_peak_bytes" if kind == "cpu" else "gpu_peak_bytes"]
    return int(max(peak, entry["total_bytes"] + cache))


def advice(result: dict[str, Any], place: dict[str, Any]) -> str:
    """The smallest change after which something fits, or that all is well."""
    from moeq.report import size

    name, cache, context = place["name"], result["cache_bytes"] or 0, result["context"]
    entries = result["schemes"]
    fitting = [entry["scheme"] for entry in entries if entry["fits"][name]]
    if len(fitting) == len(entries):
        return "everything fits"
    if fitting:
        return f"fits with {', '.join(fitting)}"
    least = min(entries, key=lambda entry: _need(entry, cache, place["kind"]))
    room = place["bytes"] - least["total_bytes"]
    tokens = int(room / cache * context) // 256 * 256 if cache and room > 0 else 0
    if tokens and _need(least, 0, place["kind"]) <= place["bytes"]:
        return f"fits with {least['scheme']} and --context {tokens}"
    missing = _need(least, cache, place["kind"]) - place["bytes"]
    return f"nothing fits: {least['scheme']} needs {size(missing)} more"


def _print(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    from moeq.cli.output import printable
    from moeq.report import by_reason, size

    console = Console()
    kinds = {place["kind"] for place in result["places"]}
    where = "gpu" if "cuda" in kinds else "cpu"
    columns = {
        "experts": "expert_bytes",
        "linears": "linear_bytes",
        "rest": "other_bytes",
        "weights": "total_bytes",
        "loading": f"{where}_peak_bytes",
    }
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("scheme", no_wrap=True)
    for heading in columns:
        table.add_column(heading, justify="right", no_wrap=True)
    for entry in result["schemes"]:
        table.add_row(entry["scheme"], *(size(entry[key]) for key in columns.values()))
    cache = result["cache_bytes"]
    known = "not known" if cache is None else size(cache)
    rate = result["read_bytes_per_second"]
    console.print(f"{result['model']}: {size(result['checkpoint_bytes'])} in the checkpoint")
    console.print(table)
    lines = [
        f"KV cache of {result['context']} tokens: {known}",
        f"loading: the most that it takes on a {where.upper()}"
        + ("; and of main memory " + size(result["schemes"][0]["gpu_host_peak_bytes"]))
        * (where == "gpu"),
    ]
    if rate:
        seconds = result["checkpoint_bytes"] / rate
        lines.append(f"reading: {seconds:.1f} s at {rate / 1e9:.2f} GB/s, as just measured")
    for place, row in zip(result["places"], result["advice"], strict=True):
        lines.append(f"{place['name']}, {size(place['bytes'])} free: {row['advice']}")
    for entry in result["schemes"]:
        lines += [f"{entry['scheme']}: {line}" for line in by_reason(entry["filled"])]
    lines += lines_about(result.get("chosen"))
    coverage = min(entry["coverage"] for entry in result["schemes"])
    lines.append(f"{coverage:.0%} of expert weights would be quantized")
    for line in lines:
        console.print(printable(line), highlight=False, markup=False)
