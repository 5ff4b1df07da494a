"""`OnlineQuantizationConfig`: which scheme for which layer.

    OnlineQuantizationConfig("fp8_per_channel")                 experts and linears, where covered
    OnlineQuantizationConfig("fp8_per_channel", linear="none")  experts alone
    OnlineQuantizationConfig(moe="int8_per_channel_weight_only", linear="fp8_per_channel")
    OnlineQuantizationConfig("int8_per_channel", ignore=["re:.*self_attn.*"])
    OnlineQuantizationConfig(targets={"model.layers.[0-3].mlp.experts": "fp8_per_block"})

Patterns name modules and mean what they mean in vLLM 0.33: `re:` and a regular expression that must
match from the start of the name, else an exact name, else a shell glob whose `*` crosses dots.
`targets` maps patterns to schemes, excludes every other way of choosing, and leaves unmatched
layers alone; its first match wins. `ignore` wins over all.
"""

from __future__ import annotations

import difflib
import fnmatch
import json
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from moeq.errors import ConfigError, PatternError
from moeq.methods.base import OnlineMoEMethodBase
from moeq.methods.four_bits import Int4OnlineMoEMethod, Mxfp4OnlineMoEMethod
from moeq.methods.fp8 import (
    Fp8PerBlockOnlineMoEMethod,
    Fp8PerChannelOnlineMoEMethod,
    Fp8PerTensorOnlineMoEMethod,
)
from moeq.methods.integers import Int8OnlineMoEMethod, Int8W8A8OnlineMoEMethod
from moeq.methods.linear import OnlineLinearMethod
from moeq.schemes import LayerKind, OnlineQuantScheme

QUANT_METHOD = "moeq"
"""What `quantization_config.quant_method` says in the config.json of a checkpoint we saved."""

FORMAT_VERSION = 1
"""Of the tensors in such a checkpoint."""

_NONE = "none"

_MOE_METHODS: dict[OnlineQuantScheme, type[OnlineMoEMethodBase]] = {
    method.scheme: method
    for method in (
        Int8OnlineMoEMethod,
        Int8W8A8OnlineMoEMethod,
        Int4OnlineMoEMethod,
        Mxfp4OnlineMoEMethod,
        Fp8PerTensorOnlineMoEMethod,
        Fp8PerChannelOnlineMoEMethod,
        Fp8PerBlockOnlineMoEMethod,
    )
}

SchemeLike = str | OnlineQuantScheme


class OnlineQuantizationConfig:
    """Which scheme for which layer; immutable. transformers and vLLM take it as it is.

    Args:
        quantization: a scheme for every kind of layer that it covers.
        moe: a scheme for experts, or "none"; overrides `quantization`.
        linear: a scheme for `nn.Linear` layers, or "none"; overrides `quantization`.
        ignore: patterns of layers to leave alone.
        targets: pattern -> scheme; excludes the three above `ignore`.
        backend: kernel backend to use instead of the oracle's choice.
        strict: whether tensors that the model has no place for are an error; else they are dropped,
            and listed in the load's report.

    Raises:
        UnknownSchemeError: for a name that is none.
        ConfigError: for combinations that cannot mean anything.
        PatternError: for a regular expression that does not compile.
    """

    def __init__(
        self,
        quantization: SchemeLike | None = None,
        *,
        moe: SchemeLike | None = None,
        linear: SchemeLike | None = None,
        ignore: Iterable[str] = (),
        targets: Mapping[str, SchemeLike] | None = None,
        backend: str | None = None,
        strict: bool = True,
    ) -> None:
        if isinstance(ignore, str) or not isinstance(ignore, Iterable):
            raise ConfigError(f"ignore is a list of patterns, found {ignore!r}")
        if targets is not None and not isinstance(targets, Mapping):
            raise ConfigError(f"targets map patterns to schemes, found {targets!r}")
        if not isinstance(strict, bool):
            raise ConfigError(f"strict is true or false, found {strict!r}")
        self.ignore = tuple(ignore)
        self.backend = backend
        self.strict = strict
        self.targets: dict[str, OnlineQuantScheme] = {}
        self.moe: OnlineQuantScheme | None = None
        self.linear: OnlineQuantScheme | None = None
        if targets:
            if quantization or moe or linear:
                raise ConfigError(
                    "targets exclude quantization, moe and linear",
                    hint="write what those would cover as further targets",
                )
            self.targets = {p: OnlineQuantScheme.parse(s) for p, s in targets.items()}
        else:
            whole = None if quantization is None else OnlineQuantScheme.parse(quantization)
            self.moe = _scheme_of_kind("moe", moe, whole)
            self.linear = _scheme_of_kind("linear", linear, whole)
            if self.moe is None and self.linear is None:
                raise ConfigError(
                    "the configuration quantizes nothing",
                    hint='name a scheme, such as "int8_per_channel_weight_only"',
                )
        for pattern in self.patterns:
            _check_pattern(pattern)

    @property
    def patterns(self) -> tuple[str, ...]:
        """Every pattern of `ignore` and `targets`."""
        return (*self.ignore, *self.targets)

    @property
    def quant_method(self) -> str:
        """Under this name, "moeq", transformers looks for a quantizer.

        Nothing is registered when moeq is imported; transformers reads this property first, so it
        is where our quantizer makes itself known to it.
        """
        from moeq.engines import register

        register()
        return QUANT_METHOD

    def scheme_for(self, name: str, kind: LayerKind) -> OnlineQuantScheme | None:
        """The scheme of the layer called `name`, or None where it stays as it is. Pure.

        Raises:
            ConfigError: a target gives the layer a scheme that does not cover its kind.
        """
        if self.is_ignored(name):
            return None
        for pattern, scheme in self.targets.items():
            if matches(pattern, name):
                _require_covers(scheme, kind, f"target {pattern!r} matches {name}, but")
                return scheme
        return self.moe if kind == "moe" else self.linear

    def get_quant_method(
        self, name: str, kind: LayerKind
    ) -> OnlineMoEMethodBase | OnlineLinearMethod | None:
        """A fresh method for the layer called `name`, or None where it stays as it is."""
        scheme = self.scheme_for(name, kind)
        if scheme is None:
            return None
        if kind == "linear":
            return OnlineLinearMethod(scheme, backend=self.backend)
        return _MOE_METHODS[scheme](backend=self.backend)

    def is_ignored(self, name: str) -> bool:
        """Whether a pattern of `ignore` matches this module."""
        return any(matches(pattern, name) for pattern in self.ignore)

    def ignoring(self, names: Iterable[str]) -> OnlineQuantizationConfig:
        """The same, with further layers left alone."""
        clone: OnlineQuantizationConfig = self.from_dict(self.to_dict())
        clone.ignore = (*self.ignore, *names)
        clone.backend, clone.strict = self.backend, self.strict
        return clone

    def check_patterns(self, names: Collection[str]) -> None:
        """Refuse a pattern that matches none of the model's layers.

        Raises:
            PatternError: with the nearest names.
        """
        for pattern in self.patterns:
            if any(matches(pattern, name) for name in names):
                continue
            literal = pattern.removeprefix("re:")
            near = difflib.get_close_matches(literal, names, n=3, cutoff=0.3)
            raise PatternError(
                f"pattern {pattern!r} matches no layer of the model",
                hint="near names: " + ", ".join(near or sorted(names)[:3]),
            )

    def to_dict(self) -> dict[str, Any]:
        """As it stands in config.json.

        Targets are a list of pairs, because their order counts and transformers sorts the keys of
        what it saves.
        """
        entries: dict[str, Any] = {"quant_method": QUANT_METHOD, "format_version": FORMAT_VERSION}
        if self.targets:
            entries["targets"] = [[p, scheme.value] for p, scheme in self.targets.items()]
        else:
            entries["moe"] = _NONE if self.moe is None else self.moe.value
            entries["linear"] = _NONE if self.linear is None else self.linear.value
        if self.ignore:
            entries["ignore"] = list(self.ignore)
        return entries

    @classmethod
    def from_dict(
        cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Any:
        """From the form of `to_dict`, or from arguments of the constructor as JSON has them.

        `return_unused_kwargs` and `kwargs` are transformers'; the latter are handed back.

        Raises:
            ConfigError: unknown keys, a foreign `quant_method`, a newer format.
        """
        entries = dict(config_dict)
        method = entries.pop("quant_method", QUANT_METHOD)
        if method != QUANT_METHOD:
            raise ConfigError(f"quant_method {method!r}, expected {QUANT_METHOD!r}")
        version = entries.pop("format_version", FORMAT_VERSION)
        if version != FORMAT_VERSION:
            raise ConfigError(
                f"the checkpoint has format {version}, this moeq reads format {FORMAT_VERSION}",
                hint="upgrade moeq, or quantize the original checkpoint again",
            )
        allowed = ("quantization", "moe", "linear", "ignore", "targets", "backend", "strict")
        for key in entries:
            if key not in allowed:
                near = difflib.get_close_matches(key, allowed, n=1)
                hint = f"did you mean {near[0]!r}?" if near else "known: " + ", ".join(allowed)
                raise ConfigError(f"unknown key {key!r} in the quantization config", hint=hint)
        if isinstance(entries.get("targets"), list):
            entries["targets"] = _pairs(entries["targets"])
        config = cls(**entries)
        return (config, kwargs) if return_unused_kwargs else config

    @classmethod
    def from_json(cls, text: str) -> OnlineQuantizationConfig:
        """From a JSON object, a scheme's bare name, or the path of a .json file that holds either.

        Raises:
            ConfigError: the file cannot be read, or is not JSON.
        """
        if text.strip().endswith(".json"):
            path = Path(text.strip())
            try:
                text = path.read_text(encoding="utf-8")
            except (OSError, ValueError) as error:
                raise ConfigError(f"{path}: not a quantization config ({error!r})") from None
        if not text.lstrip().startswith("{"):
            return cls(text.strip())
        try:
            entries = json.loads(text)
        except json.JSONDecodeError as error:
            raise ConfigError(f"not JSON: {error}") from None
        config: OnlineQuantizationConfig = cls.from_dict(entries)
        return config

    def __eq__(self, other: object) -> bool:
        return isinstance(other, OnlineQuantizationConfig) and self.to_dict() == other.to_dict()

    def __hash__(self) -> int:
        return hash(json.dumps(self.to_dict(), sort_keys=True))

    def __repr__(self) -> str:
        entries = {k: v for k, v in self.to_dict().items() if k in ("moe", "linear")}
        if self.targets:
            entries["targets"] = {p: scheme.value for p, scheme in self.targets.items()}
        if self.ignore:
            entries["ignore"] = list(self.ignore)
        return f"OnlineQuantizationConfig({', '.join(f'{k}={v!r}' for k, v in entries.items())})"


def matches(pattern: str, name: str) -> bool:
    """Whether a pattern (`re:` regex, exact name, or glob) matches a module's name."""
    if pattern.startswith("re:"):
        return re.match(pattern[3:], name) is not None
    return pattern == name or fnmatch.fnmatchcase(name, pattern)


def _check_pattern(pattern: str) -> None:
    if not isinstance(pattern, str) or not pattern.strip():
        raise PatternError(f"empty pattern {pattern!r}")
    if pattern.startswith("re:"):
        try:
            re.compile(pattern[3:])
        except re.error as error:
            raise PatternError(f"pattern {pattern!r}: {error}") from None


def _pairs(targets: list[Any]) -> dict[str, str]:
    if not all(isinstance(pair, list) and len(pair) == 2 for pair in targets):
        raise ConfigError(f"targets are pairs of pattern and scheme, found {targets!r}")
    return dict(targets)


def _scheme_of_kind(
    kind: LayerKind, asked: SchemeLike | None, whole: OnlineQuantScheme | None
) -> OnlineQuantScheme | None:
    if asked is None:
        return whole if whole is not None and whole.covers(kind) else None
    if asked == _NONE:
        return None
    scheme = OnlineQuantScheme.parse(asked)
    _require_covers(scheme, kind, "")
    return scheme


def _require_covers(scheme: OnlineQuantScheme, kind: LayerKind, context: str) -> None:
    if not scheme.covers(kind):
        able = [s.value for s in OnlineQuantScheme if s.covers(kind)]
        raise ConfigError(
            f"{context} {scheme.value} does not cover {kind} layers".strip(),
            hint=f"schemes that do: {', '.join(able)}",
        )
