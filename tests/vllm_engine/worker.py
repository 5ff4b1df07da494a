"""What the tests have vLLM do, in its own virtual environment: `python worker.py JOB RESULT`.

JOB is a JSON file: the model's folder, prompts as token ids, and runs, each with a name, vLLM's
`quantization` and further options of `vllm.LLM`. RESULT gets, by the run's name, the
log-probabilities of the prompts' tokens, their greedy completions, the log-probabilities of those,
SHA-256 of every quantized tensor of every rank, and seconds; or the error.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # `apply_model` sends a function to ranks
os.environ["VLLM_NO_USAGE_STATS"] = "1"

NEW = 24
"""Tokens of a completion."""


def run(model: str, prompts: list[list[int]], options: dict[str, Any]) -> dict[str, Any]:
    import torch
    from digests import digests
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    if torch.cuda.is_available():  # which may have other users
        few = {"gpu_memory_utilization": 0.05, "kv_cache_memory_bytes": 2**26, "max_num_seqs": 8}
        options = few | options
    started = time.perf_counter()
    llm = LLM(model, skip_tokenizer_init=True, max_model_len=256, dtype="bfloat16", **options)
    loaded = time.perf_counter()
    outputs = llm.generate(
        [{"prompt_token_ids": ids} for ids in prompts],
        SamplingParams(
            max_tokens=NEW, temperature=0, prompt_logprobs=0, logprobs=0, detokenize=False
        ),
        use_tqdm=False,
    )
    found = {
        "logprobs": [
            [next(iter(entry.values())).logprob for entry in output.prompt_logprobs[1:]]
            for output in outputs
        ],
        "completions": [list(output.outputs[0].token_ids) for output in outputs],
        "written": [
            [next(iter(entry.values())).logprob for entry in output.outputs[0].logprobs]
            for output in outputs
        ],
        "digests": llm.apply_model(digests),
        "seconds": {"load": loaded - started, "all": time.perf_counter() - started},
    }
    del llm, outputs
    gc.collect()
    cleanup_dist_env_and_memory()
    return found


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    results: dict[str, Any] = {}
    for name, options in job["runs"].items():
        model = options.pop("model", job["model"])
        try:
            results[name] = run(model, job["prompts"], options)
        except Exception as error:  # noqa: BLE001 - the test looks at it
            results[name] = {"error": f"{type(error).__name__}: {error}"}
        Path(sys.argv[2]).write_text(json.dumps(results))


if __name__ == "__main__":
    main()
