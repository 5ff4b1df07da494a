"""`moeq serve`: an OpenAI-compatible server, by vLLM or by transformers."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from moeq.cli.schemes import quiet_transformers, scheme_options

if TYPE_CHECKING:
    from moeq.config import OnlineQuantizationConfig
    from moeq.engines.serve import Address

_EPILOG = """\b
Examples:
  moeq serve ./model -q int8_per_channel_weight_only
  moeq serve ./model -q fp8_per_channel --device cuda --port 9000
  moeq serve ./model -q int8_per_channel --engine vllm -- --tensor-parallel-size 2
  MOEQ_API_KEY=... moeq serve ./model -q fp8_per_block --host 0.0.0.0
\b
What follows -- goes to vLLM as it is. Requests call the model by the end of its
path, here "model", or by --name:
  curl http://127.0.0.1:8000/v1/completions -H 'content-type: application/json' \\
    -d '{"model": "model", "prompt": "Once", "max_tokens": 32}'
"""


@click.command(epilog=_EPILOG)
@click.argument("model")
@click.argument("arguments", nargs=-1, metavar="[-- VLLM ARGUMENTS...]")
@scheme_options()
@click.option(
    "--engine",
    type=click.Choice(["auto", "vllm", "transformers"]),
    default="auto",
    show_default=True,
    help="auto: vLLM where it is installed and there is a GPU, else transformers.",
)
@click.option("--device", help="cpu, cuda, cuda:1, ...; by default a GPU where there is one.")
@click.option("--name", help="What requests call the model; by default the end of MODEL.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", type=click.IntRange(1, 65535), default=8000, show_default=True)
@click.option("--api-key", envvar="MOEQ_API_KEY", help="Needed for any host but this machine.")
@click.option("--cache", is_flag=True, help="Keep the quantized model (transformers alone).")
def serve(
    model: str,
    arguments: tuple[str, ...],
    config: OnlineQuantizationConfig | None,
    engine: str,
    device: str | None,
    name: str | None,
    host: str,
    port: int,
    api_key: str | None,
    cache: bool,
) -> None:
    """Load MODEL quantized and answer OpenAI-compatible requests.

    MODEL is a folder with config.json and safetensors, or an id on the Hugging Face hub. A
    checkpoint that is quantized already needs no scheme.
    """
    import torch

    from moeq.checkpoint.hub import resolve_model
    from moeq.checkpoint.published import is_encoded
    from moeq.engines.load import check_folder, is_saved
    from moeq.engines.serve import Address, choose_engine, serve_vllm
    from moeq.errors import BackendError, ConfigError

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    address = Address(host, port, api_key)
    address.check()
    chosen = choose_engine(engine, device)
    if chosen == "transformers" and arguments:
        raise ConfigError(
            f"{' '.join(arguments)}: arguments after -- are for vLLM, and transformers serves",
            hint="--engine vllm",
        )
    if chosen == "vllm" and cache:
        raise ConfigError("--cache: vLLM has no cache of quantized models")
    if chosen == "vllm" and config is not None and not config.strict:
        raise ConfigError("--no-strict: vLLM has rules of its own for tensors without a place")
    quiet_transformers()
    folder = resolve_model(model)
    entries = check_folder(folder)
    if config is None and not is_saved(entries):
        raise ConfigError(
            f"{folder} is not quantized by moeq and no scheme is named",
            hint="add --quantization NAME",
        )
    if chosen == "vllm" and config is not None and is_encoded(entries.get("quantization_config")):
        raise ConfigError(
            f"{folder} is published quantized, and vLLM would not have moeq decode it",
            hint="--engine transformers, or serve the folder that `moeq quantize` writes",
        )
    name = name or Path(model).resolve().name
    if chosen == "transformers":
        _serve_transformers(folder, config, device, name, address, cache)
        return
    if config is not None:
        _say_plan(folder, config, device)
    status = serve_vllm(
        folder, config, name, address, arguments, lambda: _say_ready(address, name, "vLLM")
    )
    if status:
        raise BackendError(f"vLLM ended with status {status}", hint="its messages are above")


def _serve_transformers(
    folder: Path,
    config: OnlineQuantizationConfig | None,
    device: str,
    name: str,
    address: Address,
    cache: bool,
) -> None:
    from moeq.cli.progress import bytes_bar
    from moeq.engines.load import load, load_tokenizer, report_of
    from moeq.engines.serve import serve_transformers

    tokenizer = load_tokenizer(folder)
    with bytes_bar(f"loading {name}") as progress:
        model = load(folder, config, device=device, cache=cache, progress=progress)
    for line in report_of(model).lines():
        click.echo(line, err=True)
    serve_transformers(
        model, tokenizer, name, address, lambda: _say_ready(address, name, "transformers")
    )


def _say_plan(folder: Path, config: OnlineQuantizationConfig, device: str) -> None:
    """What vLLM will hold, by our reckoning: it prints what it measures itself."""
    import torch

    from moeq.checkpoint.folder import checkpoint_files
    from moeq.checkpoint.published import read_specs
    from moeq.engines.load import empty_model
    from moeq.engines.planning import plan_load
    from moeq.report import size

    specs = read_specs(checkpoint_files(folder))
    (plan,) = plan_load(empty_model(folder), specs, config, (torch.device(device),))
    click.echo(
        f"experts  {size(plan.expert_bytes)} -> {size(plan.final_expert_bytes)}"
        f"   ({plan.coverage:.0%} of expert weights quantized)\n"
        f"weights  {size(plan.checkpoint_bytes)} -> {size(plan.final_bytes)}, over all ranks",
        err=True,
    )


def _say_ready(address: Address, name: str, engine: str) -> None:
    click.echo(f"ready on {address.url}: {name}, by {engine}", err=True)
    sys.stderr.flush()
