"""`moeq quantize`: a checkpoint into a quantized one, in the memory of a window."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from moeq.cli.schemes import quiet_transformers, scheme_options

if TYPE_CHECKING:
    from moeq.config import OnlineQuantizationConfig

_EPILOG = """\b
Examples:
  moeq quantize Qwen/Qwen3-30B-A3B -q int8_per_channel_weight_only --out qwen3-int8
  moeq quantize ./model -q fp8_per_block --linear none --out ./model-fp8
  moeq quantize ./model --moe int8_per_channel --format compressed-tensors --out ./for-vllm
"""


@click.command(epilog=_EPILOG)
@click.argument("model")
@scheme_options()
@click.option("--out", required=True, type=click.Path(path_type=Path), help="A new folder.")
@click.option(
    "--format",
    "file_format",
    type=click.Choice(["moeq", "compressed-tensors"]),
    default="moeq",
    show_default=True,
    help="moeq's own, which loads bit for bit; or one that vLLM reads.",
)
@click.option(
    "--resume",
    is_flag=True,
    help="Keep what is finished if this is interrupted, and go on from what was kept.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def quantize(
    model: str,
    config: OnlineQuantizationConfig | None,
    out: Path,
    file_format: Literal["moeq", "compressed-tensors"],
    resume: bool,
    as_json: bool,
) -> None:
    """Quantize MODEL into the folder --out, which loads at once and bit for bit as MODEL would.

    Needs memory for a few chunks and not for the model. The folder appears once it is whole.
    """
    from moeq.cli.progress import bytes_bar
    from moeq.engines.offline import quantize_checkpoint
    from moeq.errors import ConfigError
    from moeq.report import size

    if config is None:
        raise ConfigError("no scheme is named", hint="add --quantization NAME")
    quiet_transformers()
    started = time.perf_counter()
    with bytes_bar(f"quantizing {Path(model).name}") as progress:
        plan = quantize_checkpoint(
            model, config, out, file_format=file_format, resume=resume, progress=progress
        )
    seconds = time.perf_counter() - started
    if as_json:
        result = {
            "model": model,
            "out": str(out),
            "format": file_format,
            "quantization": config.to_dict(),
            "bytes_before": plan.checkpoint_bytes,
            "bytes_after": plan.final_bytes,
            "coverage": plan.coverage,
            "kept": plan.kept,
            "dropped": plan.dropped,
            "seconds": seconds,
        }
        click.echo(json.dumps(result, indent=2))
        return
    click.echo(
        f"{out}: {size(plan.checkpoint_bytes)} -> {size(plan.final_bytes)}"
        f" ({plan.coverage:.0%} of expert weights quantized) in {seconds:.1f} s"
    )
    for name in plan.dropped:
        click.echo(f"dropped  {name}: the model has no place for it")
