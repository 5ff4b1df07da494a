#!/usr/bin/env python3
"""Train a small Mixture-of-Experts language model on Python's own standard library.

What comes out is a complete checkpoint folder in the layout that hub checkpoints have: a
`Qwen3MoeForCausalLM` of 8 million parameters (16 experts a layer, 4 used by each token), one
tensor per expert, two bfloat16 shards with an index, and a byte-level BPE tokenizer.  It is small
enough to ship inside a Python package and good enough that quantizing it does something one can
measure: perplexity on ordinary source code.

Data     The `.py` files of the standard library of the Python that runs this script (or of
         `--source DIR`): 28 MB, tests included.  They are under the PSF License, version 2.
         Generated tables and files that are mostly numbers are left out.  Two groups of modules
         are held out together with their tests: VALIDATION steers decisions during training, and
         HELD_OUT is scored once, at the end.
Model    The transformers implementation itself, so the weights mean there what they meant here.
         We keep float32 master weights for the optimizer, and run forward and backward with their
         bfloat16 copies: the numbers that are evaluated are the numbers that ship.
Run      pip install torch transformers tokenizers
         python examples/train_tiny_python.py --out tiny_python        # under 4 minutes, one H100
         python examples/train_tiny_python.py --smoke --out /tmp/t     # under a minute, on a CPU
Reached  With the library of Python 3.11.7 (1,524 training files, 8.2 M tokens), after 5,000 steps
         (328 M tokens, 40 passes) in 161 seconds: loss 1.170 on training files, 1.960 on validation
         files and 2.367 on held-out files.  The last is a perplexity of 10.66 per token, 0.980 bits
         per byte; token frequencies alone give 965.8 and 2.846.  The gap between training and
         held-out files is what a corpus this small leaves; fluent code is not to be expected.

The file reads from top to bottom: corpus, tokenizer, model, batches, training, scoring.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import pathlib
import re
import sysconfig
import time
from collections.abc import Iterator
from typing import Any

import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers, processors, trainers
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func
from transformers.utils import logging

# Never trained on, and scored only after training.  Ordinary modules that CPython 3.11 to 3.14
# all have, so that anyone can score the model with the files of their own Python.
HELD_OUT = (
    "bisect.py", "cmd.py", "graphlib.py", "heapq.py", "queue.py",
    "sched.py", "shelve.py", "textwrap.py",
)  # fmt: skip
# Never trained on, but looked at while training: for choosing settings and the best checkpoint.
VALIDATION = (
    "calendar.py", "contextlib.py", "fnmatch.py", "glob.py", "netrc.py",
    "reprlib.py", "shlex.py", "timeit.py",
)  # fmt: skip
# Third-party packages, generated tables, and inputs of tests that are Python only in name.
SKIP_DIRS = {"site-packages", "__pycache__", "encodings", "pydoc_data", "data", "tokenizedata"}
SKIP_NAMES = re.compile(r"_sysconfigdata|bad|entities\.py|stringprep\.py")

END = "<|endoftext|>"  # begins every document; after the last token, it also ends one
# No line end after the last word: "\n    " begins a token of its own with the spaces that follow.
PROMPTS = (
    "def fibonacci(n):",
    "class Stack:\n    def __init__(self):",
    "import os\n\ndef read_lines(path):",
    "class TestParser(unittest.TestCase):",
    "for line in",
)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Everything that decides what the trained weights will be, except the data."""

    vocab: int = 4096
    hidden: int = 256
    layers: int = 5
    experts: int = 16
    per_token: int = 4
    expert_width: int = 96
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    context: int = 2048
    rows: int = 32  # sequences in a batch: 32 x 2048 = 65,536 tokens a step
    steps: int = 5000
    warmup: int = 200
    lr: float = 3e-3
    # As many weights as tokens, and 40 passes over these: what limits the model is data, not time.
    # Of the settings tried (decay 0.2, 0.5, 1.0; dropout 0.1, 0.2, 0.25), the strongest were best.
    weight_decay: float = 1.0
    dropout: float = 0.25
    balance: float = 0.01  # weight of the auxiliary loss that keeps all experts in use
    eval_every: int = 500
    seed: int = 1


SMOKE = Recipe(
    vocab=512, hidden=64, layers=2, expert_width=32, heads=2, kv_heads=1, head_dim=32,
    context=128, rows=4, steps=20, warmup=5, eval_every=10,
)  # fmt: skip


# ---- Corpus ------------------------------------------------------------------------------------


def is_mostly_numbers(text: str) -> bool:
    """True for tables: digits, escapes and non-ASCII make up over 15 % of what is printed."""
    body = "".join(text.split())
    return sum(c.isdigit() or c == "\\" or c > "~" for c in body) > 0.15 * len(body)


def collect(source: pathlib.Path) -> dict[str, str]:
    """The usable Python files below `source`: path relative to it, and text."""
    files = {}
    for path in sorted(source.rglob("*.py")):
        name = path.relative_to(source)
        if SKIP_DIRS.intersection(name.parts[:-1]) or SKIP_NAMES.match(name.name):
            continue
        try:
            text = path.read_text("utf-8")
        except (UnicodeDecodeError, OSError):
            continue
        if text.strip() and not is_mostly_numbers(text):
            files[name.as_posix()] = text
    return files


def split(files: dict[str, str]) -> tuple[list[str], list[str], list[str]]:
    """Training, validation and held-out texts; tests of modules held out are in none of them."""
    tests = {"test_" + name.removesuffix(".py") for name in HELD_OUT + VALIDATION}

    def is_test_of_those(name: str) -> bool:
        stems = [part.removesuffix(".py") for part in name.split("/")]
        return any(stem == t or stem.startswith(t + "_") for stem in stems for t in tests)

    unseen = {*HELD_OUT, *VALIDATION}
    train = [t for n, t in files.items() if n not in unseen and not is_test_of_those(n)]
    return train, [files[n] for n in VALIDATION], [files[n] for n in HELD_OUT]


# ---- Tokenizer ---------------------------------------------------------------------------------


def train_tokenizer(texts: list[str], recipe: Recipe) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer: every text has a tokenization, and decoding gives it back."""
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.vocab,
        special_tokens=[END],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    # Documents begin with END in training, so let the tokenizer put it before every text.
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{END} $A", special_tokens=[(END, bpe.token_to_id(END))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=END,
        eos_token=END,
        pad_token=END,
        model_max_length=recipe.context,
        clean_up_tokenization_spaces=False,
    )


# ---- Model -------------------------------------------------------------------------------------


def build_model(recipe: Recipe, end_id: int, device: str) -> Qwen3MoeForCausalLM:
    config = Qwen3MoeConfig(
        vocab_size=recipe.vocab,
        hidden_size=recipe.hidden,
        intermediate_size=recipe.per_token * recipe.expert_width,  # unused: all layers are sparse
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.kv_heads,
        head_dim=recipe.head_dim,
        max_position_embeddings=recipe.context,
        tie_word_embeddings=True,
        decoder_sparse_step=1,
        moe_intermediate_size=recipe.expert_width,
        num_experts=recipe.experts,
        num_experts_per_tok=recipe.per_token,
        norm_topk_prob=True,
        router_aux_loss_coef=recipe.balance,
        bos_token_id=end_id,
        eos_token_id=end_id,
    )
    torch.manual_seed(recipe.seed)
    model = Qwen3MoeForCausalLM(config).to(device)
    model.generation_config.pad_token_id = end_id
    # One kernel for all experts of a layer (a grouped matrix product) instead of a Python loop.
    model.set_experts_implementation("grouped_mm" if device == "cuda" else "eager")
    return model


def add_dropout(model: Qwen3MoeForCausalLM, p: float) -> None:
    """Drop parts of what attention and experts add to the residual stream (in training only).

    The architecture has no such dropout of its own; forward hooks add it without touching weights
    or code of the model.
    """

    def drop(module: torch.nn.Module, _args: object, output: Any) -> Any:
        if isinstance(output, tuple):  # attention returns (output, attention weights)
            return F.dropout(output[0], p, module.training), *output[1:]
        return F.dropout(output, p, module.training)

    for layer in model.model.layers:
        layer.self_attn.register_forward_hook(drop)
        layer.mlp.register_forward_hook(drop)


def watch_routers(model: Qwen3MoeForCausalLM) -> list[torch.Tensor]:
    """A list to which every forward pass appends the router logits of each layer."""
    seen: list[torch.Tensor] = []
    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(lambda _m, _args, output: seen.append(output[0]))
    return seen


# ---- Batches -----------------------------------------------------------------------------------


def batches(
    documents: list[torch.Tensor], recipe: Recipe
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless (inputs, targets), both (rows, context).

    Each pass over the corpus joins the documents in a new order and starts cutting at a new
    offset, so that the same text comes back in other company and at other positions.
    """
    generator = torch.Generator().manual_seed(recipe.seed)
    size = recipe.context
    while True:
        order = torch.randperm(len(documents), generator=generator).tolist()
        stream = torch.cat([documents[i] for i in order])
        offset = int(torch.randint(size, (), generator=generator))
        count = (len(stream) - offset - 1) // size
        inputs = stream[offset:][: count * size].view(count, size)
        targets = stream[offset + 1 :][: count * size].view(count, size)
        rows = torch.randperm(count, generator=generator).to(stream.device)
        for part in rows.split(recipe.rows)[:-1]:  # the last may be short: leave it out
            yield inputs[part], targets[part]


# ---- Training ----------------------------------------------------------------------------------


def token_loss(
    hidden: torch.Tensor, embedding: torch.Tensor, targets: torch.Tensor
) -> torch.Tensor:
    """Cross entropy of the next token; the output layer is the embedding, transposed."""
    return F.cross_entropy((hidden @ embedding.T).float().flatten(0, 1), targets.flatten())


def learning_rate(step: int, recipe: Recipe) -> float:
    """Linear warm-up, then linear decay all the way to zero."""
    if step < recipe.warmup:
        return recipe.lr * (step + 1) / recipe.warmup
    return recipe.lr * (recipe.steps - step) / (recipe.steps - recipe.warmup)


class MasterWeights:
    """AdamW on float32 copies of a model's parameters, which themselves become bfloat16.

    The cast goes parameter by parameter: `model.bfloat16()` would also round the frequencies of
    the rotary embedding, which are float32 again when the checkpoint is loaded.
    """

    def __init__(self, model: Qwen3MoeForCausalLM, recipe: Recipe) -> None:
        self.recipe = recipe
        self.working: list[torch.Tensor] = list(model.parameters())
        self.masters = [p.detach().clone().requires_grad_() for p in self.working]
        for p in self.working:
            p.data = p.data.bfloat16()
        decay = [m for m in self.masters if m.ndim > 1]
        scales = [m for m in self.masters if m.ndim == 1]  # of the norms: no decay
        self.optimizer = torch.optim.AdamW(
            [
                {"params": decay, "weight_decay": recipe.weight_decay},
                {"params": scales, "weight_decay": 0.0},
            ],
            betas=(0.9, 0.95),
            fused=self.masters[0].is_cuda,
        )

    @torch.no_grad()
    def step(self, step: int) -> None:
        for master, p in zip(self.masters, self.working, strict=True):
            assert p.grad is not None
            master.grad, p.grad = p.grad.float(), None
        torch.nn.utils.clip_grad_norm_(self.masters, 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(step, self.recipe)
        self.optimizer.step()
        torch._foreach_copy_(self.working, self.masters)


def train(
    model: Qwen3MoeForCausalLM,
    documents: list[torch.Tensor],
    validation: list[torch.Tensor],
    recipe: Recipe,
    out: pathlib.Path,
) -> None:
    """Train, saving to `out` whenever the validation loss is the lowest so far."""
    add_dropout(model, recipe.dropout)
    router_logits = watch_routers(model)
    weights = MasterWeights(model, recipe)
    loss_of = token_loss
    if model.device.type == "cuda":
        loss_of = torch.compile(token_loss)
        for layer in model.model.layers:  # by layer: quicker than the whole model
            layer.compile()
    stream = batches(documents, recipe)
    best, start, total = math.inf, time.perf_counter(), torch.zeros((), device=model.device)
    for step in range(recipe.steps):
        model.train()
        router_logits.clear()
        inputs, targets = next(stream)
        hidden = model.model(input_ids=inputs, use_cache=False).last_hidden_state
        loss = loss_of(hidden, model.lm_head.weight, targets)
        # Balanced layer by layer.  (Called with all layers at once, it would balance their sum.)
        balance = sum(
            load_balancing_loss_func((logits,), recipe.experts, recipe.per_token)
            for logits in router_logits
        ) / len(router_logits)
        (loss + recipe.balance * balance).backward()
        weights.step(step)
        total += loss.detach()

        done = step + 1
        if done % recipe.eval_every == 0 or done == recipe.steps:
            with torch.compiler.set_stance("force_eager"):  # other shapes: do not compile for them
                val = score(model, validation)
            seconds = time.perf_counter() - start
            mean = total.item() / ((done - 1) % recipe.eval_every + 1)
            total.zero_()
            print(
                f"step {done:5d}  {seconds:4.0f} s  train {mean:.4f}  validation {val:.4f}"
                f"  balance {balance.item():.2f}",
                flush=True,
            )
            if val < best:
                best = val
                # Writes gate_proj, up_proj and down_proj of each expert as tensors of their own.
                model.save_pretrained(out, max_shard_size="9MB")


def use_hub_names(out: pathlib.Path) -> None:
    """Two names as published checkpoints spell them, which old and new transformers both read."""
    config = json.loads((out / "config.json").read_text("utf-8"))
    if "num_local_experts" in config:
        config["num_experts"] = config.pop("num_local_experts")
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    (out / "config.json").write_text(text, "utf-8")
    settings = json.loads((out / "tokenizer_config.json").read_text("utf-8"))
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    text = json.dumps(settings, indent=2, sort_keys=True) + "\n"
    (out / "tokenizer_config.json").write_text(text, "utf-8")


# ---- Scoring -----------------------------------------------------------------------------------


@torch.no_grad()
def score(model: Qwen3MoeForCausalLM, documents: list[torch.Tensor]) -> float:
    """Mean loss in nats per token, each document read in windows that do not overlap."""
    model.eval()
    window, total, count = model.config.max_position_embeddings, 0.0, 0
    for ids in documents:
        for i in range(0, len(ids) - 1, window):
            part = ids[i : i + window + 1]
            logits = model(input_ids=part[None, :-1], use_cache=False).logits[0].float()
            total += F.cross_entropy(logits, part[1:], reduction="sum").item()
            count += len(part) - 1
    return total / count


def unigram(train: list[torch.Tensor], documents: list[torch.Tensor], vocab: int) -> float:
    """The same for a model that knows only how frequent each token is (add-one smoothing)."""
    counts = torch.bincount(torch.cat(train).cpu(), minlength=vocab).double() + 1
    log_p = (counts / counts.sum()).log()
    return -log_p[torch.cat([ids[1:] for ids in documents]).cpu()].mean().item()


@torch.no_grad()
def expert_usage(model: Qwen3MoeForCausalLM, documents: list[torch.Tensor]) -> torch.Tensor:
    """Per layer, the share of choices that each expert gets: (layers, experts), rows sum to 1."""
    seen, config = watch_routers(model), model.config
    score(model, documents)
    counts = torch.zeros(config.num_hidden_layers, config.num_experts)
    for i, logits in enumerate(seen):
        chosen = logits.topk(config.num_experts_per_tok).indices.flatten().cpu()
        counts[i % len(counts)] += chosen.bincount(minlength=config.num_experts)
    return counts / counts.sum(1, keepdim=True)


def describe(name: str, loss: float, texts: list[str], documents: list[torch.Tensor]) -> str:
    tokens = sum(len(ids) - 1 for ids in documents)
    size = sum(len(text.encode()) for text in texts)
    bits = loss * tokens / math.log(2) / size
    return (
        f"{name:<11} loss {loss:.4f}  perplexity {math.exp(loss):8.3f}  bits per byte {bits:.4f}"
        f"  ({len(texts)} files, {size:,} bytes, {tokens:,} tokens)"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--source", type=pathlib.Path, help="folder with the standard library")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder to write")
    parser.add_argument("--steps", type=int, help="training steps, instead of the recipe's")
    parser.add_argument("--smoke", action="store_true", help="a tiny model, for a few steps")
    args = parser.parse_args()
    recipe = SMOKE if args.smoke else Recipe()
    if args.steps:
        recipe = dataclasses.replace(recipe, steps=args.steps)
    if args.smoke:
        torch.set_num_threads(1)  # many tiny operations: threads would only wait for each other
    device = "cuda" if torch.cuda.is_available() and not args.smoke else "cpu"
    logging.disable_progress_bar()
    start = time.perf_counter()

    files = collect(args.source or pathlib.Path(sysconfig.get_paths()["stdlib"]))
    train_texts, val_texts, held_texts = split(files)
    if args.smoke:
        train_texts, val_texts, held_texts = train_texts[::100], val_texts[-1:], held_texts[:1]
    tokenizer = train_tokenizer(train_texts, recipe)
    tokenizer.save_pretrained(args.out)

    def encode(texts: list[str]) -> list[torch.Tensor]:
        return [
            torch.tensor(ids, device=device) for ids in tokenizer(texts, verbose=False).input_ids
        ]

    documents, validation, held_out = encode(train_texts), encode(val_texts), encode(held_texts)
    tokens = sum(len(ids) for ids in documents)
    model = build_model(recipe, tokenizer.eos_token_id, device)
    size = sum(p.numel() for p in model.parameters())
    print(
        f"{len(train_texts)} training files, {sum(len(t.encode()) for t in train_texts):,} bytes, "
        f"{tokens:,} tokens; {size:,} parameters; prepared in {time.perf_counter() - start:.0f} s",
        flush=True,
    )
    began = time.perf_counter()
    train(model, documents, validation, recipe, args.out)
    wall = time.perf_counter() - began
    seen = recipe.steps * recipe.rows * recipe.context
    print(f"\n{recipe.steps} steps, {seen:,} tokens ({seen / tokens:.1f} passes), {wall:.0f} s")

    use_hub_names(args.out)
    # From here on: what a user gets, that is, the folder loaded anew.
    model, info = AutoModelForCausalLM.from_pretrained(
        args.out, dtype=torch.bfloat16, output_loading_info=True
    )
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    model = model.to(device)
    tokenizer = AutoTokenizer.from_pretrained(args.out)
    sample = slice(0, None, max(1, len(documents) // 50))  # of the training files, for comparison
    for name, texts, ids in (
        ("train", train_texts[sample], documents[sample]),
        ("validation", val_texts, validation),
        ("held out", held_texts, held_out),
    ):
        print(describe(name, score(model, ids), texts, ids))
    baseline = unigram(documents, held_out, recipe.vocab)
    print(describe("  unigram", baseline, held_texts, held_out))

    print("\nshare of the held-out tokens' choices by expert, per layer (even: 1/experts)")
    for i, row in enumerate(expert_usage(model, held_out).tolist()):
        shares = [f"{100 * share:.1f}" for share in row]
        print(f"layer {i}: {' '.join(shares)}  (min {min(row):.1%}, max {max(row):.1%})")
    for prompt in PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(device)
        output = model.generate(**inputs, max_new_tokens=8 if args.smoke else 64, do_sample=False)
        print(f"\n--- completion of {prompt!r}\n{tokenizer.decode(output[0, 1:])}")


if __name__ == "__main__":
    main()
