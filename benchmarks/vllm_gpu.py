"""moeq's schemes in vLLM's own engine on a GPU, against moeq's engine: the plugin, and checkpoints.

    python benchmarks/vllm_gpu.py [--rows NAME ...] [--folder FOLDER]

Makes a small Qwen3-MoE checkpoint with random weights, and has vLLM say the log-probabilities of
random prompts' tokens: in rows `moeq_SCHEME` by moeq's plugin, which quantizes the checkpoint as it
loads; in the others without it, from what `moeq quantize --format compressed-tensors` wrote.
Columns: mean |difference| in nats a token

    vs moeq     vLLM, moeq.load (transformers, the same GPU) with the scheme
    floor       moeq.load with the scheme, the same with another attention: what rounding does
    control     as `vs moeq`, but the checkpoint's gates and ups are exchanged for vLLM:
                what a comparison of the wrong experts looks like
    vs bf16     moeq.load with the scheme, transformers in bf16: what the scheme costs

Rows with a second word differ from vLLM's defaults, or compare with what vLLM makes of the scheme:

    int8_per_channel/w8a16      vLLM 0.26 leaves the activations of int8 experts alone, whatever the
                                checkpoint says; so does moeq here
    fp8_per_block/fp32-scales   on Hopper vLLM rounds activations' and linears' scales to powers of
                                two for DeepGEMM; not here (VLLM_USE_DEEP_GEMM_E8M0=0)

The exit status is 1 where an engine failed, or where vLLM is not closer to moeq than to a fifth of
the control. Needs vLLM and moeq in one environment; environment variables reach vLLM.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

BF16 = "bf16"
WEIGHT_ONLY = "int8_per_channel_weight_only"
FOUR_BITS = "int4_per_group_weight_only"

VOCABULARY = 1024
PROMPTS, TOKENS = 8, 128

Logprobs = list[list[float]]
"""Of every token but the first, a prompt a list."""


@dataclass(frozen=True)
class Row:
    """One comparison.

    Attributes:
        scheme: what the checkpoint is quantized with.
        reference: for `moeq.load`, a scheme's name or JSON; empty for the scheme.
        environment: vLLM's.
        by_plugin: whether vLLM quantizes the checkpoint while it loads.
    """

    scheme: str
    reference: str = ""
    environment: dict[str, str] = field(default_factory=dict)
    by_plugin: bool = False


ROWS = {
    "int8_per_channel": Row("int8_per_channel"),
    "int8_per_channel/w8a16": Row(
        "int8_per_channel", json.dumps({"moe": WEIGHT_ONLY, "linear": "int8_per_channel"})
    ),
    "fp8_per_channel": Row("fp8_per_channel"),
    "fp8_per_block": Row("fp8_per_block"),
    "fp8_per_block/fp32-scales": Row("fp8_per_block", environment={"VLLM_USE_DEEP_GEMM_E8M0": "0"}),
    WEIGHT_ONLY: Row(WEIGHT_ONLY),
    FOUR_BITS: Row(FOUR_BITS),
    **{
        f"moeq_{scheme}": Row(scheme, environment={"VLLM_PLUGINS": "moeq"}, by_plugin=True)
        for scheme in (
            WEIGHT_ONLY, FOUR_BITS, "int8_per_channel",
            "fp8_per_tensor", "fp8_per_channel", "fp8_per_block",
        )
    },
}  # fmt: skip


def prompts() -> list[list[int]]:
    import random

    random_ = random.Random(0)
    return [[random_.randrange(VOCABULARY) for _ in range(TOKENS)] for _ in range(PROMPTS)]


def make(folder: Path) -> None:
    """A Qwen3-MoE checkpoint whose activations keep their size and whose logits are spread."""
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        vocab_size=VOCABULARY, hidden_size=512, num_hidden_layers=2, num_attention_heads=8,
        num_key_value_heads=4, head_dim=64, num_experts=16, num_experts_per_tok=4,
        moe_intermediate_size=256, intermediate_size=1024, norm_topk_prob=True,
        tie_word_embeddings=False, max_position_embeddings=1024, bos_token_id=None,
        eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim < 2:
                continue
            fan_in = 1 if "embed" in name else parameter.shape[-1]
            gain = 1.0
            if ".experts." in name or "lm_head" in name:
                gain = 2.0  # experts lose size in the activation and in their mean
            elif "mlp.gate." in name:
                gain = 3.0  # so that rounding seldom changes which experts a token gets
            parameter.normal_(std=gain * fan_in**-0.5)
    model.to(torch.bfloat16).save_pretrained(folder)


def exchange(source: Path, folder: Path) -> None:
    """The checkpoint with every expert's gate in the place of its up."""
    from safetensors.torch import load_file, save_file

    other = {"gate_proj": "up_proj", "up_proj": "gate_proj"}
    folder.mkdir()
    for file in source.iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
            continue
        tensors = {
            re.sub(r"(?<=\d\.)(gate_proj|up_proj)", lambda match: other[match[0]], name): tensor
            for name, tensor in load_file(file).items()
        }
        save_file(tensors, folder / file.name, metadata={"format": "pt"})


def of_vllm(folder: str, quantization: str = "") -> Logprobs:
    """In a process of its own."""
    from vllm import LLM, SamplingParams

    engine = LLM(
        folder,
        quantization=quantization or None,
        dtype="bfloat16",
        skip_tokenizer_init=True,
        enforce_eager=True,
        max_model_len=2 * TOKENS,
        max_num_batched_tokens=PROMPTS * TOKENS,
        max_num_seqs=PROMPTS,
        gpu_memory_utilization=0.05,
        kv_cache_memory_bytes=64 * 2**20,
        enable_prefix_caching=False,
    )
    sampling = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
    inputs: list[Any] = [{"prompt_token_ids": ids} for ids in prompts()]
    found = []
    for output in engine.generate(inputs, sampling, use_tqdm=False):
        steps = zip(output.prompt_token_ids, output.prompt_logprobs, strict=True)
        found.append([step[token].logprob for token, step in steps if step is not None])
    return found


def of_moeq(folder: str, reference: str, attention: str) -> Logprobs:
    """transformers on the GPU."""
    import torch
    from transformers import AutoModelForCausalLM

    import moeq

    if reference == BF16:
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.bfloat16, attn_implementation=attention
        ).to("cuda")
    else:
        model = moeq.load(folder, reference, device="cuda", attn_implementation=attention)
    ids = torch.tensor(prompts(), device="cuda")
    with torch.inference_mode():
        logprobs = model(ids).logits[:, :-1].float().log_softmax(-1)
    found: Logprobs = logprobs.gather(-1, ids[:, 1:, None]).squeeze(-1).tolist()
    return found


def difference(a: Logprobs, b: Logprobs) -> float:
    pairs = [(x, y) for p, q in zip(a, b, strict=True) for x, y in zip(p, q, strict=True)]
    return sum(abs(x - y) for x, y in pairs) / len(pairs)


def quantize(source: Path, scheme: str, out: Path) -> None:
    if out.exists():
        return
    words = ["quantize", str(source), "-q", scheme, "--format", "compressed-tensors"]
    command = [sys.executable, "-m", "moeq.cli", *words, "--out", str(out)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def in_process(log: Path, environment: dict[str, str], *words: str) -> Logprobs | str:
    """What an engine in a process of its own says, or how it failed."""
    result = log.with_suffix(".json")
    command = [sys.executable, __file__, "--one", str(result), *words]
    own = {
        "VLLM_PLUGINS": "",  # none, unless the row says moeq's
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    with log.open("w") as stream:
        done = subprocess.run(
            command, env=os.environ | own | environment, stdout=stream, stderr=subprocess.STDOUT
        )
    if done.returncode == 0:
        found: Logprobs = json.loads(result.read_text())
        return found
    lines = [line for line in log.read_text().splitlines() if "Error" in line]
    return f"{lines[-1].strip() if lines else f'exit status {done.returncode}'} (all of it: {log})"


def kernels(log: Path) -> list[str]:
    """What vLLM's log says of the kernels that it chose."""
    found = re.findall(r"\] ((?:Using|Selected|moeq:) .*?)(?: out of .*)?$", log.read_text(), re.M)
    return sorted({line for line in found if re.search("(?i)backend|kernel|method", line)})


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=ROWS, metavar="NAME")
    parser.add_argument("--folder", type=Path, help="keeps checkpoints, logs and results there")
    parser.add_argument("--parallel", type=int, default=4, help="engines at a time on the GPU")
    parser.add_argument("--one", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        result, engine, *words = args.one
        found = of_vllm(*words) if engine == "vllm" else of_moeq(*words)
        Path(result).write_text(json.dumps(found))
        return 0
    rows = {name: ROWS[name] for name in args.rows}
    with tempfile.TemporaryDirectory() as temporary:
        return compare(args.folder or Path(temporary), rows, args.parallel)


def compare(folder: Path, rows: dict[str, Row], parallel: int) -> int:
    folder.mkdir(parents=True, exist_ok=True)
    source, broken = folder / BF16, folder / "exchanged"
    if not source.exists():
        make(source)
    if not broken.exists():
        exchange(source, broken)
    schemes = {row.scheme for row in rows.values() if not row.by_plugin}
    jobs: dict[str, tuple[dict[str, str], tuple[str, ...]]] = {}

    def moeq(reference: str) -> tuple[str, str]:
        """The names of a reference's two runs."""
        names = []
        for attention in ("sdpa", "eager"):
            names.append(re.sub(r"\W+", "_", f"moeq {attention} {reference}").strip("_"))
            jobs[names[-1]] = {}, ("moeq", str(source), reference, attention)
        return names[0], names[1]

    def vllm(path: Path, environment: dict[str, str], quantization: str = "") -> str:
        """The name of a run."""
        name = "_".join(["vllm", path.name, *environment, quantization]).strip("_")
        jobs[name] = environment, ("vllm", str(path), quantization)
        return name

    runs = {BF16: (vllm(source, {}), *moeq(BF16), vllm(broken, {}))}
    for name, row in rows.items():
        right, exchanged = folder / row.scheme, folder / f"exchanged_{row.scheme}"
        if row.by_plugin:
            right, exchanged = source, broken
        quantization = name if row.by_plugin else ""
        runs[name] = (
            vllm(right, row.environment, quantization),
            *moeq(row.reference or row.scheme),
            vllm(exchanged, row.environment, quantization),
        )
    with ThreadPoolExecutor(parallel) as pool:
        for job in [
            pool.submit(quantize, model, scheme, folder / f"{prefix}{scheme}")
            for model, prefix in ((source, ""), (broken, "exchanged_"))
            for scheme in schemes
        ]:
            job.result()
        pending = {
            name: pool.submit(in_process, folder / f"{name}.log", environment, *words)
            for name, (environment, words) in jobs.items()
        }
        outcomes = {name: future.result() for name, future in pending.items()}

    print(", ".join(f"{name} {version(name)}" for name in ("vllm", "torch", "transformers")))
    for name, (own, *_) in runs.items():
        print(f"{name}: {'; '.join(kernels(folder / f'{own}.log'))}")
    for name, outcome in outcomes.items():
        if isinstance(outcome, str):
            print(f"failed: {name}: {outcome}")
    found = {name: outcome for name, outcome in outcomes.items() if not isinstance(outcome, str)}

    def between(a: str, b: str) -> float | None:
        return difference(found[a], found[b]) if a in found and b in found else None

    unquantized = runs[BF16][1]
    values = [value for prompt in found.get(unquantized, []) for value in prompt]
    if values:
        mean = sum(values) / len(values)
        print(f"{len(values)} tokens, whose mean log-probability in bf16 is {mean:.3f}")
    print(f"{'':35}{'vs moeq':>9}{'floor':>9}{'control':>9}{'vs bf16':>9}")
    agree = len(found) == len(outcomes)
    for name, (own, reference, again, control) in runs.items():
        delta, wrong = between(own, reference), between(control, reference)
        cells = delta, between(again, reference), wrong, between(reference, unquantized)
        texts = ["-" if cell is None else f"{cell:.4f}" for cell in cells]
        print(f"{name:35}" + "".join(f"{text:>9}" for text in texts))
        agree &= delta is not None and wrong is not None and delta < wrong / 5
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())
