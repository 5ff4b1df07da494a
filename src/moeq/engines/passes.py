"""The forward passes of an evaluation: every window of text with the original and with each scheme.

At a layer all passes wait; its experts are read, the passes of the original run transformers' own
module, and for each scheme the layer is quantized, runs the passes of that scheme, is measured and
dropped. See `evaluate` for what it is for.
"""

from __future__ import annotations

import functools
import inspect
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from moeq.config import OnlineQuantizationConfig
from moeq.engines.hf_deferred import Deferred, own_parameters, read_experts
from moeq.engines.hf_layers import QuantizedLayer, quantize_experts, quantize_linear
from moeq.engines.hf_structure import Target
from moeq.engines.lockstep import Call, in_lockstep
from moeq.errors import ModelError
from moeq.fidelity.divergence import divergence, log_likelihoods
from moeq.fidelity.statistics import Values
from moeq.schemes import OnlineQuantScheme

_IN_FLIGHT = 1 << 29
"""Bytes of hidden states of all passes; more text is evaluated in several readings."""

_STATES = 8
"""Hidden states that a pass holds: residual, the module's input and output, and what else lives."""

_SAMPLE = 4
"""Windows on which the outputs of single layers are compared."""

Progress = Callable[[int, int], None]
"""Called with expert bytes read so far and to be read."""


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
class Scores:
    """Of one model, for every window: [W] arrays of [T - 1], or [T] of routers."""

    windows: int
    seconds: float = 0.0
    found: dict[str, dict[int, Values]] = field(default_factory=dict)
    routers: dict[int, Values] = field(default_factory=dict)
    by_layer: dict[str, list[float]] = field(default_factory=dict)

    def add(self, window: int, **values: Tensor) -> None:
        for name, tensor in values.items():
            self.found.setdefault(name, {})[window] = tensor.double().numpy()

    def add_router(self, layer: str, window: int, agreement: Tensor) -> None:
        found = agreement.double().cpu().numpy()
        self.routers[window] = self.routers[window] + found if window in self.routers else found
        self.by_layer.setdefault(layer, []).append(float(agreement.mean()))

    def values(self, name: str) -> Values:
        """[N] in the text's order."""
        return np.concatenate([self.found[name][w] for w in range(self.windows)])

    def router_values(self) -> Values | None:
        if not self.routers:
            return None
        return np.concatenate([self.routers[w] for w in range(self.windows)]) / len(self.by_layer)


class Passes:
    """All passes through the model, and what was seen of them."""

    def __init__(
        self,
        deferred: Deferred,
        quantizations: Mapping[str, OnlineQuantizationConfig],
        windows: Tensor,
        device: torch.device,
    ) -> None:
        self._deferred = deferred
        self._names, self._configs = list(quantizations), list(quantizations.values())
        self.windows = windows
        self._device = device
        decisions = deferred.decisions
        self.targets = [{t.shape.name: t for t in decision.targets} for decision in decisions]
        served = {name: t for targets in self.targets for name, t in targets.items()}
        served |= {name: target for name, (target, _) in deferred.experts.items()}
        self._served: dict[str, Target] = served
        models = (None, *range(len(quantizations)))
        self.scores = {model: Scores(len(windows)) for model in models}
        self.noise = Scores(len(windows))
        self.hits: dict[str, Tensor] = {}
        self.errors: dict[tuple[str, OnlineQuantScheme], tuple[float, tuple[float, ...]]] = {}
        self.notes: dict[OnlineQuantScheme, str] = {}
        self._squares: dict[tuple[str, OnlineQuantScheme], list[float]] = {}

    def run(self, progress: Progress | None) -> None:
        """Through the whole text, in as many readings as its hidden states need."""
        text = self._deferred.model.config.get_text_config()
        state = self.windows.shape[1] * text.hidden_size * self._deferred.model.dtype.itemsize
        models = len(self._configs) + 2
        step = max(2, _IN_FLIGHT // (_STATES * state * models) // 2 * 2)
        count = len(self.windows)
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
        self._running = []
        for first in windows[::2]:
            some = [w for w in (first, first + 1) if w in windows]
            # A last one without a partner is its own
            pair = (first, some[-1])
            self._running += [_Pass(None, (w,)) for w in some]
            self._running.append(_Pass(None, pair))
            self._running += [_Pass(i, (w,)) for i in range(len(self._configs)) for w in some]
        self._reference: dict[int, Tensor] = {}
        seconds = in_lockstep(
            self._deferred.model,
            self._served,
            [functools.partial(self._forward, each) for each in self._running],
            self._serve,
            self._done,
            self._clock,
        )
        for each, took in zip(self._running, seconds, strict=True):
            self._scores_of(each).seconds += took
        self._reference.clear()

    def _clock(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def _scores_of(self, each: _Pass) -> Scores:
        return self.noise if len(each.windows) > 1 else self.scores[each.config]

    def _forward(self, each: _Pass) -> Tensor:
        ids = self.windows[list(each.windows)].to(self._device)
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
        schemes = {call.index: self._scheme_at(name, self._running[call.index]) for call in calls}
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
            self._scores_of(self._running[call.index]).seconds += self._clock() - started

    def _is_noise(self, call: Call) -> bool:
        return len(self._running[call.index].windows) > 1

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
            each = self._running[call.index]
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
            each = self._running[call.index]
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
        each = self._running[index]
        scores = self._scores_of(each)
        for w, rows in zip(each.windows, logits[:, :-1], strict=True):
            if each.config is None and len(each.windows) == 1:
                self._reference[w] = rows
                for old in [other for other in self._reference if other < w - 1]:
                    del self._reference[old]
            if not bool((rows.amax(-1) < torch.inf).all()):  # NaN is not either
                model = "the original" if each.config is None else self._names[each.config]
                raise ModelError(
                    f"logits of window {w} are not numbers with {model}",
                    hint="the weights overflow in the model's dtype; nothing can be compared",
                )
            ids = self.windows[w, 1:].to(rows.device)
            kl, agrees = divergence(self._reference[w], rows)
            scores.add(w, kl=kl, agrees=agrees, log_likelihoods=log_likelihoods(rows, ids))
