"""`moeq generate`: load a model quantized and let it write."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from moeq.cli.schemes import quiet_transformers, scheme_options

if TYPE_CHECKING:
    from moeq.config import OnlineQuantizationConfig

_COMPILE_FROM_TOKENS = 1024
"""16 layers of Qwen3-30B's size took 34 s to compile and 3.6 ms a token after that, on an H100
where transformers takes 31 ms a token uncompiled."""

_EPILOG = """\b
Examples:
  moeq generate Qwen/Qwen3-30B-A3B -q int8_per_channel_weight_only --prompt Once
  moeq generate ./model -q fp8_per_channel --linear none --json --prompt Once
  moeq generate ./model -q int8_per_channel_weight_only --cache --prompt Once
  moeq generate ./model --targets "re:.*experts=fp8_per_block" < prompt.txt
\b
Schemes:
  int8_per_channel_weight_only, int8_per_channel,
  fp8_per_channel, fp8_per_tensor, fp8_per_block
"""


@click.command(epilog=_EPILOG)
@click.argument("model")
@scheme_options()
@click.option("--prompt", help="Text to continue; read from stdin where absent.")
@click.option("--max-new-tokens", type=click.IntRange(1), default=64, show_default=True)
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda, cuda:1, ...")
@click.option("--cache", is_flag=True, help="Keep the quantized model for the next time.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def generate(
    model: str,
    config: OnlineQuantizationConfig | None,
    prompt: str | None,
    max_new_tokens: int,
    device: str,
    cache: bool,
    as_json: bool,
) -> None:
    """Load MODEL quantized and continue a prompt, greedily.

    MODEL is a folder with config.json and safetensors, or an id on the Hugging Face hub. A
    checkpoint that moeq saved needs no scheme.
    """
    if prompt is None:
        if sys.stdin is None or sys.stdin.isatty():
            raise click.UsageError("no prompt: pass --prompt, or pipe text in")
        prompt = sys.stdin.buffer.read().decode("utf-8", errors="surrogateescape")
    if not prompt:
        raise click.UsageError("the prompt is empty")
    if not prompt.isascii() and any("\ud800" <= c <= "\udfff" for c in prompt):
        raise click.UsageError("the prompt is not UTF-8 text")
    result = _generate(
        model, config, prompt, max_new_tokens, device, cache=cache, stream=not as_json
    )
    if as_json:
        click.echo(json.dumps(result, indent=2))


def _generate(
    model_name: str,
    config: OnlineQuantizationConfig | None,
    prompt: str,
    max_new_tokens: int,
    device: str,
    *,
    cache: bool,
    stream: bool,
) -> dict[str, Any]:
    import torch
    from transformers import TextStreamer

    from moeq.checkpoint.hub import resolve_model
    from moeq.cli.progress import bytes_bar
    from moeq.engines.load import (
        check_folder,
        load,
        load_tokenizer,
        quantization_of,
        report_of,
    )
    from moeq.errors import CheckpointError

    quiet_transformers()
    folder = resolve_model(model_name)
    check_folder(folder)
    tokenizer = load_tokenizer(folder)
    inputs = tokenizer(prompt, return_tensors="pt")
    length = inputs["input_ids"].shape[1]
    if length == 0:
        raise CheckpointError(f"{folder}: its tokenizer makes no tokens of the prompt")
    with bytes_bar(f"loading {Path(model_name).name}") as progress:
        model = load(folder, config, device=device, cache=cache, progress=progress)
    report = report_of(model)
    for line in report.lines():
        click.echo(line, err=True)
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and length + max_new_tokens > limit:
        click.echo(f"note: {length + max_new_tokens} tokens, the model knows {limit}", err=True)
    streamer = (
        TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True) if stream else None
    )
    options: dict[str, Any] = {}
    if torch.device(device).type == "cuda":
        # A cache of fixed size lets transformers compile decoding and replay it as a CUDA graph
        compiles = max_new_tokens >= _COMPILE_FROM_TOKENS
        options = {"cache_implementation": "static", "disable_compile": not compiles}
        if compiles:
            click.echo("compiling after the first token; takes about a minute", err=True)
    started = time.perf_counter()
    output = model.generate(
        **inputs.to(device),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        streamer=streamer,
        **options,
    )
    seconds = time.perf_counter() - started
    new = output[0, length:]
    click.echo(f"{len(new)} tokens, {len(new) / seconds:.1f} tokens/s", err=True)
    return {
        "model": model_name,
        "quantization": quantization_of(model).to_dict(),
        "prompt": prompt,
        "text": tokenizer.decode(new, skip_special_tokens=True),
        "new_tokens": len(new),
        "seconds": seconds,
        "load": report.to_dict(),
    }
