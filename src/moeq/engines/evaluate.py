"""`moeq.evaluate`: what schemes cost in quality, against the original, in one reading of it.

Neither the original nor any quantized model is ever in memory. What is not an expert is loaded;
experts are read a layer at a time. Every window of text runs in a forward pass of its own, with the
original and with each scheme, and all passes go through a layer together (`lockstep`):

    the layer's experts are read      in the checkpoint's dtype
    passes of the original            run transformers' own module
    for each scheme                   quantize the layer, run the passes of that scheme, drop it

So a scheme's layers are what a load makes of them, run on the kernels that it would choose, and
their errors add up from layer to layer as in a loaded model. The original runs a second time, two
windows at a time and its experts one after another: how far that is from the first is the noise of
its own arithmetic, the same products in another order.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moeq.checkpoint.folder import checkpoint_files
from moeq.checkpoint.hub import resolve_model
from moeq.checkpoint.published import read_specs
from moeq.config import OnlineQuantizationConfig
from moeq.engines.hf_deferred import load_deferred
from moeq.engines.load import check_folder, checked_device, empty_model
from moeq.engines.passes import Passes, Progress, Scores
from moeq.engines.planning import plan_load
from moeq.errors import CheckpointError, ConfigError, ModelError
from moeq.fidelity import statistics
from moeq.fidelity.result import Evaluation, Fidelity, LayerFidelity, SchemeFidelity, outliers
from moeq.memory import PeakMemory
from moeq.plan import LoadPlan

WINDOW = 512
"""Tokens that see each other. llama.cpp's perplexity has the same by default."""


def evaluate(
    model: str | Path,
    quantizations: Mapping[str, str | OnlineQuantizationConfig],
    ids: Tensor | Sequence[int],
    *,
    device: str = "cpu",
    window: int = WINDOW,
    progress: Progress | None = None,
) -> Evaluation:
    """Compare a model under some schemes with the original, on the same text.

    Args:
        model: a folder with a checkpoint that moeq did not write, or an id on the Hugging Face hub.
            Where it is published quantized, the original is what its codes stand for, in bf16.
        quantizations: scheme names or configs, each by a name for it.
        ids: token ids [N], or [1, N] as tokenizers return them; what does not fill a window at the
            end is left out.
        device: "cpu", "cuda", ...
        window: tokens that see each other; less where the model knows fewer positions.
        progress: called with expert bytes read so far and to be read.

    Raises:
        ConfigError: no scheme; ids that are none; the checkpoint is quantized by moeq; the text is
            shorter than a window.
        MoeqError: as a load would under any of the schemes.
    """
    started = time.perf_counter()
    if not quantizations:
        raise ConfigError("no scheme to evaluate", hint="name at least one")
    folder = resolve_model(model)
    check_folder(folder)
    target_device = checked_device(device)
    empty = empty_model(folder)
    windows = cut(_as_ids(ids), empty, window)
    by_name = {
        name: OnlineQuantizationConfig.from_json(each) if isinstance(each, str) else each
        for name, each in quantizations.items()
    }
    configs = list(by_name.values())
    specs = read_specs(checkpoint_files(folder))
    plans = [next(iter(plan_load(empty, specs, c, [target_device]))) for c in configs]
    with PeakMemory(target_device) as memory, torch.no_grad():
        deferred = load_deferred(folder, configs, target_device)
        passes = Passes(deferred, by_name, windows, target_device)
        passes.run(progress)
    reference = passes.scores[None]
    described = zip(by_name.items(), plans, strict=True)
    return Evaluation(
        tokens=windows.numel(),
        scored=windows[:, 1:].numel(),
        window=windows.shape[1],
        bytes=plans[0].checkpoint_bytes,
        expert_bytes=plans[0].expert_bytes,
        perplexity=statistics.perplexity(reference.values("log_likelihoods")),
        tokens_per_second=windows.numel() / reference.seconds,
        noise_floor=_fidelity(passes.noise, reference),
        experts={name: tuple(hits.tolist()) for name, hits in passes.hits.items()},
        schemes=tuple(
            _scheme(name, config, plan, passes, index)
            for index, ((name, config), plan) in enumerate(described)
        ),
        seconds=time.perf_counter() - started,
        peak_bytes=memory.peak_bytes,
    )


def _as_ids(ids: Tensor | Sequence[int]) -> Tensor:
    found = torch.as_tensor(ids)
    found = found[0] if found.ndim == 2 and len(found) == 1 else found
    kind = f"{found.dtype} {list(found.shape)}"
    if found.ndim != 1 or found.is_floating_point() or found.is_complex():
        raise ConfigError(f"token ids are {kind}, expected integers [N] or [1, N]")
    if found.numel() and int(found.min()) < 0:
        raise ConfigError(f"token id {int(found.min())}, expected none below 0")
    return found.long()


def cut(ids: Tensor, model: Any, window: int = WINDOW) -> Tensor:
    """Token ids [N] as windows [W, T].

    Raises:
        ConfigError: too few for one.
        CheckpointError: ids that the model does not have.
        ModelError: it does not predict tokens.
    """
    if model.get_output_embeddings() is None:
        raise ModelError(
            f"{type(model).__name__} does not predict tokens, and its outputs cannot be compared",
            hint="moeq evaluates language models",
        )
    if window < 2:
        raise ConfigError(f"a window of {window} tokens, expected 2 at least")
    known = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    window = min(window, known) if isinstance(known, int) and known > 1 else window
    count = len(ids) // window
    if count == 0:
        raise ConfigError(
            f"the text has {len(ids)} tokens, and one window is {window}",
            hint="give a longer text: some thousand tokens make useful intervals",
        )
    entries = model.get_input_embeddings().weight.shape[0]
    if int(ids.max()) >= entries:
        raise CheckpointError(
            f"the tokenizer makes token {int(ids.max())}, the model knows {entries}",
            hint="tokenizer and model do not belong together",
        )
    return ids[: count * window].view(count, window)


def _fidelity(scores: Scores, reference: Scores) -> Fidelity:
    ours, theirs = scores.values("log_likelihoods"), reference.values("log_likelihoods")
    routers = scores.router_values()
    return Fidelity(
        kl=statistics.spread(scores.values("kl")),
        top1_agreement=statistics.interval(scores.values("agrees"), np.mean),
        perplexity=statistics.perplexity(ours),
        perplexity_ratio=statistics.perplexity_ratio(ours, theirs),
        router_agreement=None if routers is None else statistics.interval(routers, np.mean),
    )


def _scheme(
    name: str,
    config: OnlineQuantizationConfig,
    plan: LoadPlan,
    passes: Passes,
    index: int,
) -> SchemeFidelity:
    scores, targets = passes.scores[index], passes.targets[index]
    layers, unseen = [], []
    for layer, target in targets.items():
        if (layer, target.scheme) not in passes.errors:
            unseen.append(layer)
            continue
        error, weight_errors = passes.errors[layer, target.scheme]
        agreement = scores.by_layer.get(layer)
        layers.append(
            LayerFidelity(
                name=layer,
                kind=target.shape.kind,
                scheme=target.scheme.value,
                output_error=error,
                router_agreement=None if agreement is None else float(np.mean(agreement)),
                weight_error=weight_errors,
            )
        )
    schemes = dict.fromkeys(target.scheme for target in targets.values())
    return SchemeFidelity(
        scheme=name,
        quantization=config.to_dict(),
        bytes=plan.final_bytes,
        expert_bytes=plan.final_expert_bytes,
        coverage=plan.coverage,
        fidelity=_fidelity(scores, passes.scores[None]),
        tokens_per_second=passes.windows.numel() / scores.seconds,
        layers=tuple(layers),
        outliers=outliers(tuple(layers)),
        unseen=tuple(unseen),
        kept=plan.kept,
        notes=tuple(passes.notes[scheme] for scheme in schemes if scheme in passes.notes),
    )
