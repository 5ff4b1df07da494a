"""Does moeq make Mixture-of-Experts models faster on a CPU, and how far is it from llama.cpp?

    python benchmarks/cpu.py [--llama-python PATH] [--folder DIR] [--json]

One run, all peers, their repetitions interleaved, so that a noisy moment hits all alike:

    transformers bf16         experts with grouped_mm, and eager
    moeq                      int8 weight-only experts; int8 experts and linears; fp8 the same;
                              four-bit experts and linears
    llama.cpp                 BF16 and Q8_0, where --llama-python names an interpreter that can
                              import llama_cpp and gguf

on one random Qwen3-MoE: 4 layers, hidden 2048, 64 experts of 768, top-8, vocabulary 8192 (1.3 G
weights; values do not matter for speed). Medians of decoding one token after a prompt, and of
prompts of 128 tokens, for every number of threads. Needs 12 GB of memory with llama.cpp and 7 GB
of disk; --folder keeps the models for the next run.

llama.cpp is at its best when built for the machine; not every virtual machine reports what it has,
so name it (drop what /proc/cpuinfo does not list; add -DGGML_AMX_INT8=ON where it does):

    python -m venv llama && llama/bin/pip install gguf numpy
    CMAKE_ARGS="-DGGML_NATIVE=OFF -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON -DGGML_BMI2=ON
        -DGGML_AVX512=ON -DGGML_AVX512_VBMI=ON -DGGML_AVX512_VNNI=ON -DGGML_AVX512_BF16=ON"
        llama/bin/pip install --no-binary llama-cpp-python llama-cpp-python==0.3.36
    python benchmarks/cpu.py --llama-python llama/bin/python

llama.cpp quantizes the output head too (7 % of the weights that a token meets); the others keep
it in bf16.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

LAYERS, HIDDEN, INTERMEDIATE, EXPERTS, TOP_K = 4, 2048, 768, 64, 8
HEADS, KV_HEADS, HEAD_DIM, VOCABULARY = 32, 4, 128, 8192
PROMPT = 128

GROUPED, EAGER = "transformers bf16 grouped_mm", "transformers bf16 eager"
WEIGHT_ONLY, INT8 = "moeq int8_per_channel_weight_only", "moeq int8_per_channel"
FP8 = "moeq fp8_per_channel"
INT4 = "moeq int4_per_group_weight_only"
LLAMA = {"BF16": "llama.cpp BF16", "Q8_0": "llama.cpp Q8_0"}

TARGETS: list[tuple[str, str, str, Callable[[float], bool], str]] = [
    (WEIGHT_ONLY, "decode", "bf16", lambda ratio: ratio <= 0.75, "<= 0.75x the time"),
    (WEIGHT_ONLY, "prefill", "bf16", lambda ratio: ratio >= 0.8, ">= 0.8x the speed"),
    (INT8, "decode", LLAMA["Q8_0"], lambda ratio: ratio <= 1.1, "<= 1.1x the time"),
    (INT8, "prefill", "bf16", lambda ratio: ratio >= 1.0, ">= 1.0x the speed"),
    (INT4, "decode", WEIGHT_ONLY, lambda ratio: ratio < 1.0, "< 1.0x the time"),
]
"""Who, at what, against whom ("bf16": the better of transformers' two), and what is wanted."""


class Peer(Protocol):
    """Somebody who runs the model."""

    def prefill(self, threads: int) -> float:
        """Seconds for a new prompt of `PROMPT` tokens."""

    def decode(self, tokens: int) -> list[float]:
        """Seconds for each of some more tokens."""


class TransformersPeer:
    """A transformers model; two peers may share one and differ in the experts' implementation."""

    def __init__(self, model: Any, experts: str | None = None) -> None:
        self.model, self.experts = model.eval(), experts

    def prefill(self, threads: int) -> float:
        import torch

        torch.set_num_threads(threads)
        if self.experts is not None:
            self.model.set_experts_implementation(self.experts)
        self.cache = None
        return self._forward(PROMPT)

    def decode(self, tokens: int) -> list[float]:
        return [self._forward(1) for _ in range(tokens)]

    def _forward(self, tokens: int) -> float:
        import torch

        ids = torch.randint(10, VOCABULARY, (1, tokens))
        with torch.inference_mode():
            start = time.perf_counter()
            output = self.model(ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
            seconds = time.perf_counter() - start
        self.cache = output.past_key_values
        return seconds


class LlamaPeer:
    """llama.cpp in a process of its own; it takes commands on stdin and answers in JSON."""

    def __init__(self, python: str, file: Path) -> None:
        command = [python, __file__, "--llama-worker", str(file)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.system = self._ask("system")

    def prefill(self, threads: int) -> float:
        return float(self._ask(f"prefill {threads}"))

    def decode(self, tokens: int) -> list[float]:
        return list(self._ask(f"decode {tokens}"))

    def _ask(self, command: str) -> Any:
        assert self.process.stdin is not None and self.process.stdout is not None
        print(command, file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"error: llama.cpp died on {command!r}, status {self.process.wait()}")
        return json.loads(line)


def main() -> None:
    arguments = parse_arguments()
    if arguments.llama_worker:
        serve_llama(arguments.llama_worker)
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.folder or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        peers = make_peers(folder, arguments.llama_python)
        results = {
            threads: measure(peers, threads, arguments.rounds, arguments.tokens)
            for threads in arguments.threads
        }
    report = {"machine": machine(peers), "results": results, "targets": judge(results)}
    if arguments.json:
        print(json.dumps(report, indent=2))
    else:
        print_table(report)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--llama-python", metavar="PATH", help="interpreter with llama_cpp and gguf"
    )
    parser.add_argument("--folder", type=Path, help="keep the models here (default: nowhere)")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=7, help="prompts of every peer (default: 7)")
    parser.add_argument("--tokens", type=int, default=8, help="decoded after each (default: 8)")
    parser.add_argument("--json", action="store_true", help="everything measured, to stdout")
    parser.add_argument("--llama-worker", metavar="GGUF", help=argparse.SUPPRESS)
    return parser.parse_args()


def make_peers(folder: Path, llama_python: str | None) -> dict[str, Peer]:
    """Build the checkpoints that are missing, and load everybody."""
    import transformers

    import moeq

    transformers.utils.logging.disable_progress_bar()
    checkpoint = folder / "qwen3-moe"
    if not (checkpoint / "config.json").exists():
        say("making the checkpoint")
        make_checkpoint(checkpoint)
    bf16 = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype="bfloat16")
    peers: dict[str, Peer] = {
        GROUPED: TransformersPeer(bf16, "grouped_mm"),
        EAGER: TransformersPeer(bf16, "eager"),
    }
    for name in (WEIGHT_ONLY, INT8, FP8, INT4):
        say(f"loading {name}")
        peers[name] = TransformersPeer(moeq.load(checkpoint, name.split()[1]))
    if llama_python is None:
        say("llama.cpp is left out: --llama-python names no interpreter that has it")
        return peers
    for kind, name in LLAMA.items():
        file = folder / f"{kind}.gguf"
        if not file.exists():
            say(f"making {file.name}")
            run = "import runpy, sys; runpy.run_path(sys.argv[1])['make_gguf'](*sys.argv[2:])"
            command = [llama_python, "-c", run, __file__, str(file), kind]
            subprocess.run(command, check=True)
        peers[name] = LlamaPeer(llama_python, file)
    return peers


def make_checkpoint(folder: Path) -> None:
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        moe_intermediate_size=INTERMEDIATE,
        num_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        norm_topk_prob=True,
        dtype="bfloat16",
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    model = Qwen3MoeForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder)


def measure(
    peers: dict[str, Peer], threads: int, rounds: int, tokens: int
) -> dict[str, dict[str, float]]:
    """Median ms of a decoded token and tokens/s of a prompt, for every peer. Every peer warms up
    once; then they take turns."""
    prompts: dict[str, list[float]] = {name: [] for name in peers}
    steps: dict[str, list[float]] = {name: [] for name in peers}
    for turn in range(rounds + 1):
        say(f"{threads} threads, round {turn} of {rounds}")
        for name, peer in peers.items():
            prompt, step = peer.prefill(threads), peer.decode(tokens)
            if turn:
                prompts[name].append(prompt)
                steps[name] += step
    return {
        name: {
            "decode": statistics.median(steps[name]) * 1e3,
            "prefill": PROMPT / statistics.median(prompts[name]),
        }
        for name in peers
    }


def judge(results: dict[int, dict[str, dict[str, float]]]) -> list[dict[str, Any]]:
    """Every target whose peers ran: its ratio, and whether it is met."""
    verdicts = []
    for threads, by_peer in results.items():
        for name, what, against, is_met, wanted in TARGETS:
            best = min if what == "decode" else max
            rivals = (GROUPED, EAGER) if against == "bf16" else (against,)
            if not all(rival in by_peer for rival in rivals):
                continue
            ratio = by_peer[name][what] / best(by_peer[rival][what] for rival in rivals)
            verdicts.append(
                {
                    "threads": threads,
                    "peer": name,
                    "what": what,
                    "against": against,
                    "ratio": ratio,
                    "wanted": wanted,
                    "met": is_met(ratio),
                }
            )
    return verdicts


def machine(peers: dict[str, Peer]) -> dict[str, str]:
    """What it ran on and with."""
    import torch
    import transformers

    flags = torch.cpu.get_capabilities()
    wanted = ("avx2", "avx512_f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16")
    found = {
        "cpu": f"{flags.get('cpu_name')}, {flags.get('num_physical_cores')} cores",
        "flags": " ".join(flag for flag in wanted if flags.get(flag)),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    for peer in peers.values():
        if isinstance(peer, LlamaPeer):
            found["llama.cpp"] = peer.system
    return found


def print_table(report: dict[str, Any]) -> None:
    for key, value in report["machine"].items():
        print(f"{key:14}{value}")
    for threads, by_peer in report["results"].items():
        title = f"{threads} thread{'s' if threads > 1 else ''}"
        print(f"\n{title:36}{'decode ms/token':>16}{'prefill tokens/s':>18}")
        for name, figures in by_peer.items():
            print(f"{name:36}{figures['decode']:16.1f}{figures['prefill']:18.0f}")
    print()
    for verdict in report["targets"]:
        print(
            f"{'met   ' if verdict['met'] else 'MISSED'}  {verdict['threads']} threads"
            f"  {verdict['peer']}: {verdict['what']} {verdict['ratio']:.2f}x"
            f" of {verdict['against']} (wanted {verdict['wanted']})"
        )


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


# What runs in llama.cpp's interpreter, which needs neither torch nor moeq.


def make_gguf(path: str, kind: str) -> None:
    """The same shapes for llama.cpp, random codes under scales that keep activations finite."""
    import gguf
    import numpy as np

    random = np.random.default_rng(0)
    quant = gguf.GGMLQuantizationType[kind]
    writer = gguf.GGUFWriter(path, "qwen3moe")
    writer.add_block_count(LAYERS)
    writer.add_context_length(4096)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(6144)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_key_length(HEAD_DIM)
    writer.add_value_length(HEAD_DIM)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(1e6)
    writer.add_expert_count(EXPERTS)
    writer.add_expert_used_count(TOP_K)
    writer.add_expert_feed_forward_length(INTERMEDIATE)
    writer.add_vocab_size(VOCABULARY)
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{kind}"])
    writer.add_tokenizer_model("no_vocab")

    def matrix(name: str, *shape: int) -> None:
        if kind == "BF16":  # the upper halves of fp32
            values = random.random(shape, dtype=np.float32) * 0.07 - 0.035
            data = (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
        else:  # blocks of an fp16 scale and 32 codes
            blocks = (*shape[:-1], shape[-1] // 32)
            codes = random.integers(-127, 128, (*blocks, 32), dtype=np.int8).view(np.uint8)
            scale = np.full((*blocks, 1), 0.035 / 127, np.float16).view(np.uint8)
            data = np.concatenate([scale, codes], axis=-1).reshape(*shape[:-1], -1)
        writer.add_tensor(name, data, raw_dtype=quant)

    def vector(name: str, size: int) -> None:
        writer.add_tensor(name, np.ones(size, np.float32))

    matrix("token_embd.weight", VOCABULARY, HIDDEN)
    matrix("output.weight", VOCABULARY, HIDDEN)
    vector("output_norm.weight", HIDDEN)
    for layer in range(LAYERS):
        at = f"blk.{layer}."
        vector(at + "attn_norm.weight", HIDDEN)
        vector(at + "ffn_norm.weight", HIDDEN)
        matrix(at + "attn_q.weight", HEADS * HEAD_DIM, HIDDEN)
        matrix(at + "attn_k.weight", KV_HEADS * HEAD_DIM, HIDDEN)
        matrix(at + "attn_v.weight", KV_HEADS * HEAD_DIM, HIDDEN)
        matrix(at + "attn_output.weight", HIDDEN, HEADS * HEAD_DIM)
        vector(at + "attn_q_norm.weight", HEAD_DIM)
        vector(at + "attn_k_norm.weight", HEAD_DIM)
        router = random.standard_normal((EXPERTS, HIDDEN), dtype=np.float32) * 0.02
        writer.add_tensor(at + "ffn_gate_inp.weight", router)
        matrix(at + "ffn_gate_exps.weight", EXPERTS, INTERMEDIATE, HIDDEN)
        matrix(at + "ffn_up_exps.weight", EXPERTS, INTERMEDIATE, HIDDEN)
        matrix(at + "ffn_down_exps.weight", EXPERTS, HIDDEN, INTERMEDIATE)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def serve_llama(file: str) -> None:
    """Answer `system`, `prefill THREADS` and `decode TOKENS` from stdin, a line of JSON each."""
    import ctypes

    import llama_cpp as llama
    import numpy as np

    quiet = llama.llama_log_callback(lambda level, text, data: None)
    llama.llama_log_set(quiet, ctypes.c_void_p(0))
    llama.llama_backend_init()
    model_params = llama.llama_model_default_params()
    model_params.use_mmap = False
    model = llama.llama_model_load_from_file(file.encode(), model_params)
    params = llama.llama_context_default_params()
    params.n_ctx, params.n_batch = 1024, 512
    context = llama.llama_init_from_model(model, params)
    random = np.random.default_rng(0)
    position = 0

    def forward(tokens: int) -> float:
        nonlocal position
        batch = llama.llama_batch_init(tokens, 0, 1)
        batch.n_tokens = tokens
        for i in range(tokens):
            batch.token[i] = int(random.integers(10, VOCABULARY))
            batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = position + i, 1, 0
            batch.logits[i] = i == tokens - 1
        start = time.perf_counter()
        status = llama.llama_decode(context, batch)
        llama.llama_get_logits(context)  # waits
        seconds = time.perf_counter() - start
        llama.llama_batch_free(batch)
        assert status == 0, status
        position += tokens
        return seconds

    for line in sys.stdin:
        command, _, number = line.strip().partition(" ")
        answer: Any
        if command == "system":
            answer = llama.llama_print_system_info().decode().strip()
        elif command == "prefill":
            llama.llama_set_n_threads(context, int(number), int(number))
            llama.llama_memory_clear(llama.llama_get_memory(context), True)
            position = 0
            answer = forward(PROMPT)
        else:
            answer = [forward(1) for _ in range(int(number))]
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
