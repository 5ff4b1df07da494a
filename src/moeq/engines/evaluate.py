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

import functools
import inspect
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moeq.checkpoint.folder import checkpoint_files
from moeq.checkpoint.hub import resolve_model
from moeq.checkpoint.published import read_specs
from moeq.config import OnlineQuantizationConfig
from moeq.engines.hf_deferred import Deferred, load_deferred, own_parameters, read_experts
from moeq.engines.hf_layers import QuantizedLayer, quantize_experts, quantize_linear
from moeq.engines.hf_structure import Target
from moeq.engines.load import check_folder, empty_model, is_saved
from moeq.engines.lockstep import Call, in_lockstep
from moeq.engines.planning import plan_load
from moeq.errors import CheckpointError, ConfigError, ModelError
from moeq.fidelity import statistics
from moeq.fidelity.divergence import divergence, log_likelihoods
from moeq.fidelity.result import Evaluation, Fidelity, LayerFidelity, SchemeFidelity, outliers
from moeq.fidelity.statistics import Values
from moeq.memory import PeakMemory
from moeq.plan import LoadPlan
from moeq.schemes import OnlineQuantScheme

WINDOW = 512
"""Tokens that see each other. llama.cpp's perplexity has the same by default."""

_IN_FLIGHT = 1 << 29
"""Bytes of hidden states of all passes; more text is evaluated in several readings."""

_STATES = 8
"""Hidden states that a pass holds: residual, the module's input and output, and what else lives."""

_SAMPLE = 4
"""Windows on which the outputs of single layers are compared."""

Progress = Callable[[int, int], None]


def evaluate(
    model: str | Path,
    quantizations: Mapping[str, OnlineQuantizationConfig],
    ids: Tensor,
    *,
    device: str = "cpu",
    window: int = WINDOW,
    progress: Progress | None = None,
) -> Evaluation:
    """Compare a model under some schemes with the original, on the same text.

    Args:
        model: a folder with a checkpoint that moeq did not write, or an id on the Hugging Face hub.
            Where it is published quantized, the original is what its codes stand for, in bf16.
        quantizations: configs, each by a name for it.
        ids: token ids [N]; what does not fill a window at the end is left out.
        device: "cpu", "cuda", ...
        window: tokens that see each other; less where the model knows fewer positions.
        progress: called with expert bytes read so far and to be read.

    Raises:
        ConfigError: no scheme; the checkpoint is quantized; the text is shorter than a window.
        MoeqError: as a load would under any of the schemes.
    """
    started = time.perf_counter()
    if not quantizations:
        raise ConfigError("no scheme to evaluate", hint="name at least one")
    folder = resolve_model(model)
    if is_saved(check_folder(folder)):
        raise ConfigError(
            f"{folder} is already quantized by moeq, and nothing is left to compare it with",
            hint="evaluate the original checkpoint under its scheme: same bytes, same result",
        )
    empty = empty_model(folder)
    windows = cut(ids, empty, window)
    target_device = torch.device(device)
    configs = list(quantizations.values())
    specs = read_specs(checkpoint_files(folder))
    plans = [next(iter(plan_load(empty, specs, c, [target_device]))) for c in configs]
    with PeakMemory(target_device) as memory, torch.no_grad():
        deferred = load_deferred(folder, configs, target_device)
        passes = _Passes(deferred, configs, windows, target_device)
        passes.run(progress)
    reference = passes.scores[None]
    described = zip(quantizations.items(), plans, strict=True)
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
    known = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    window = min(window, known) if isinstance(known, int) and known > 1 else window
    count = len(ids) // window
    if count == 0:
        raise ConfigError(
            f"the text has {len(ids)} tokens, and one window is {window}",
            hint="give a longer text; some thousand tokens make useful intervals",
        )
    entries = model.get_input_embeddings().weight.shape[0]
    if int(ids.max()) >= entries:
        raise CheckpointError(
            f"the tokenizer makes token {int(ids.max())}, the model knows {entries}",
            hint="tokenizer and model do not belong together",
        )
    return ids[: count * window].view(count, window)


@dataclass(frozen=True)
class _Pass:
    """Some windows under one config.

    Attributes:
        config: its index; None for the original.
        windows: their indices.
    """

    config: int | None
    windows: tuple[int, ...]


@dataclass
class _Scores:
    """Of one model, for every window: [W] arrays of [T - 1], or [T] of routers."""

    windows: int
    seconds: float = 0.0
    found: dict[str, dict[int, Values]] = field(default_factory=dict)
    routers: dict[int, list[Values]] = field(default_factory=dict)
    by_layer: dict[str, list[float]] = field(default_factory=dict)

    def add(self, window: int, **values: Tensor) -> None:
        for name, tensor in values.items():
            self.found.setdefault(name, {})[window] = tensor.double().numpy()

    def add_router(self, layer: str, window: int, agreement: Tensor) -> None:
        self.routers.setdefault(window, []).append(agreement.double().cpu().numpy())
        self.by_layer.setdefault(layer, []).append(float(agreement.mean()))

    def values(self, name: str) -> Values:
        """[N] in the text's order."""
        return np.concatenate([self.found[name][w] for w in range(self.windows)])

    def router_values(self) -> Values | None:
        if not self.routers:
            return None
        return np.concatenate([np.mean(self.routers[w], axis=0) for w in range(self.windows)])


class _Passes:
    """All passes through the model, and what was seen of them."""

    def __init__(
        self,
        deferred: Deferred,
        configs: Sequence[OnlineQuantizationConfig],
        windows: Tensor,
        device: torch.device,
    ) -> None:
        self._deferred = deferred
        self._configs = configs
        self._windows = windows
        self._device = device
        decisions = deferred.decisions
        self.targets = [{t.shape.name: t for t in decision.targets} for decision in decisions]
        served = {name: t for targets in self.targets for name, t in targets.items()}
        self._served: dict[str, Target] = served
        models = (None, *range(len(configs)))
        self.scores = {model: _Scores(len(windows)) for model in models}
        self.noise = _Scores(len(windows))
        self.hits: dict[str, Tensor] = {}
        self.errors: dict[tuple[str, OnlineQuantScheme], tuple[float, tuple[float, ...]]] = {}
        self.notes: dict[OnlineQuantScheme, str] = {}
        self._squares: dict[tuple[str, OnlineQuantScheme], list[float]] = {}

    def run(self, progress: Progress | None) -> None:
        """Through the whole text, in as many readings as its hidden states need."""
        text = self._deferred.model.config.get_text_config()
        state = self._windows.shape[1] * text.hidden_size * self._deferred.model.dtype.itemsize
        models = len(self._configs) + 2
        step = max(2, _IN_FLIGHT // (_STATES * state * models) // 2 * 2)
        count = len(self._windows)
        readings = range(0, count, step)
        layers = self._deferred.experts.values()
        total = sum(plan.source_bytes for _, plan in layers) * len(readings)
        self._read = 0

        def advance(nbytes: int) -> None:
            self._read += nbytes
            if progress is not None:
                progress(self._read, total)

        self._advance = advance
        for first in readings:
            self._run_some(range(first, min(first + step, count)))

    def _run_some(self, windows: range) -> None:
        self._passes = []
        for first in windows[::2]:
            some = [w for w in (first, first + 1) if w in windows]
            # A last one without a partner is its own
            pair = (first, some[-1])
            self._passes += [_Pass(None, (w,)) for w in some]
            self._passes.append(_Pass(None, pair))
            self._passes += [_Pass(i, (w,)) for i in range(len(self._configs)) for w in some]
        self._reference: dict[int, Tensor] = {}
        seconds = in_lockstep(
            self._deferred.model,
            self._served,
            [functools.partial(self._forward, each) for each in self._passes],
            self._serve,
            self._done,
            self._clock,
        )
        for each, took in zip(self._passes, seconds, strict=True):
            self._scores_of(each).seconds += took
        self._reference.clear()

    def _clock(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def _scores_of(self, each: _Pass) -> _Scores:
        return self.noise if len(each.windows) > 1 else self.scores[each.config]

    def _forward(self, each: _Pass) -> Tensor:
        ids = self._windows[list(each.windows)].to(self._device)
        logits: Tensor = self._deferred.model(input_ids=ids, use_cache=False).logits
        return logits

    # What happens at a layer.

    def _serve(self, name: str, calls: list[Call]) -> list[Tensor]:
        target = self._served[name]
        module = self._deferred.model.get_submodule(name)
        experts = None
        if name in self._deferred.experts:
            experts = read_experts(*self._deferred.experts[name], self._device, self._advance)
            own = own_parameters(module, experts, self._deferred.model.dtype)
            module._parameters.update(own)
            self._see_routers(target, calls)
        outputs: dict[int, Tensor] = {}
        run = functools.partial(self._compute, outputs)
        schemes = {call.index: self._scheme_at(name, self._passes[call.index]) for call in calls}
        plain = [call for call in calls if schemes[call.index] is None]
        once = [call for call in plain if not self._is_noise(call)]
        noise = [call for call in plain if self._is_noise(call)]
        run(functools.partial(type(module).forward, module), once)
        # Beneath transformers' choice of a kernel is the loop over experts of the model's own code
        run(functools.partial(inspect.unwrap(type(module).forward), module), noise)
        for scheme in dict.fromkeys(s for s in schemes.values() if s is not None):
            config = self._config_with(name, scheme)
            if experts is not None:
                layer = quantize_experts(config, target, experts, self._deferred.model.dtype)
            else:
                layer = quantize_linear(config, target, module, self._deferred.model.dtype)
            run(layer, [call for call in calls if schemes[call.index] is scheme])
            self._compare(name, scheme, layer, calls, outputs)
        if experts is not None:
            for own_name in own:
                module._parameters.pop(own_name)
        return [outputs[call.index] for call in calls]

    def _compute(
        self, outputs: dict[int, Tensor], layer: Callable[..., Tensor], calls: list[Call]
    ) -> None:
        for call in calls:
            started = self._clock()
            outputs[call.index] = layer(*call.args)
            self._scores_of(self._passes[call.index]).seconds += self._clock() - started

    def _is_noise(self, call: Call) -> bool:
        return len(self._passes[call.index].windows) > 1

    def _scheme_at(self, name: str, each: _Pass) -> OnlineQuantScheme | None:
        target = None if each.config is None else self.targets[each.config].get(name)
        return None if target is None else target.scheme

    def _config_with(self, name: str, scheme: OnlineQuantScheme) -> OnlineQuantizationConfig:
        """One that gives the layer this scheme; which of them does not matter."""
        for config, targets in zip(self._configs, self.targets, strict=True):
            if name in targets and targets[name].scheme is scheme:
                return config
        raise AssertionError((name, scheme))

    def _compare(
        self,
        name: str,
        scheme: OnlineQuantScheme,
        layer: QuantizedLayer,
        calls: list[Call],
        outputs: dict[int, Tensor],
    ) -> None:
        """The layer's outputs with the original's, on the original's inputs."""
        assert layer.method.choice is not None
        if layer.method.choice.note:
            self.notes[scheme] = layer.method.choice.note
        wrong, whole = self._squares.setdefault((name, scheme), [0.0, 0.0])
        for call in calls:
            each = self._passes[call.index]
            if each.config is None and len(each.windows) == 1 and each.windows[0] < _SAMPLE:
                expected = outputs[call.index].float()
                wrong += float((layer(*call.args).float() - expected).square().sum())
                whole += float(expected.square().sum())
        self._squares[name, scheme] = [wrong, whole]
        error = (wrong / whole) ** 0.5 if whole else 0.0
        self.errors[name, scheme] = error, layer.weight_errors

    def _see_routers(self, target: Target, calls: list[Call]) -> None:
        """Which experts were chosen, and whether they are those that the original chose."""
        name, chosen = target.shape.name, {}
        for call in calls:
            each = self._passes[call.index]
            ids = call.args[1]
            if len(ids) % len(each.windows):
                raise ModelError(f"{name}: {len(ids)} tokens of {len(each.windows)} windows")
            chosen[each] = dict(zip(each.windows, ids.chunk(len(each.windows)), strict=False))
        original = {w: ids for e, found in chosen.items() for w, ids in found.items()
                    if e.config is None and len(e.windows) == 1}  # fmt: skip
        hits = self.hits.setdefault(name, torch.zeros(target.shape.num_experts, dtype=torch.long))
        for ids in original.values():
            hits += torch.bincount(ids.flatten(), minlength=len(hits)).cpu()
        for each, found in chosen.items():
            for w, ids in found.items():
                same = (ids[:, :, None] == original[w][:, None, :]).any(-1)
                self._scores_of(each).add_router(name, w, same.float().mean(-1))

    # What happens at the end of a pass.

    def _done(self, index: int, logits: Tensor) -> None:
        each = self._passes[index]
        scores = self._scores_of(each)
        for w, rows in zip(each.windows, logits[:, :-1], strict=True):
            if each.config is None and len(each.windows) == 1:
                self._reference[w] = rows
                for old in [other for other in self._reference if other < w - 1]:
                    del self._reference[old]
            ids = self._windows[w, 1:].to(rows.device)
            kl, agrees = divergence(self._reference[w], rows)
            scores.add(w, kl=kl, agrees=agrees, log_likelihoods=log_likelihoods(rows, ids))


def _fidelity(scores: _Scores, reference: _Scores) -> Fidelity:
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
    passes: _Passes,
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
        tokens_per_second=passes._windows.numel() / scores.seconds,
        layers=tuple(layers),
        outliers=outliers(tuple(layers)),
        unseen=tuple(unseen),
        kept=plan.kept,
        notes=tuple(passes.notes[scheme] for scheme in schemes if scheme in passes.notes),
    )
