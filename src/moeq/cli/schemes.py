"""The options that choose schemes, the same for every command."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from moeq.config import OnlineQuantizationConfig

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


_REFINEMENTS = (
    click.option("--moe", help='A scheme for experts, or "none".'),
    click.option("--linear", help='A scheme for linear layers, or "none".'),
    click.option("--ignore", multiple=True, help="Leave layers alone: name, glob or re:regex."),
    click.option("--targets", multiple=True, metavar="PATTERN=SCHEME", help="Only these layers."),
    click.option(
        "--no-strict",
        is_flag=True,
        help="Drop tensors that the model has no place for, and list them.",
    ),
)


def refinement_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """What refines --quantization, as `config_of` and `configs_of` take it."""
    for option in reversed(_REFINEMENTS):
        command = option(command)
    return command


def scheme_options(
    quantization: str = "A scheme for every kind of layer that it covers, or a config: FILE.json.",
) -> Decorator:
    """The options that choose schemes, for any command, which gets them as one argument `config`:
    an `OnlineQuantizationConfig`, or None where none was given.

    Args:
        quantization: what --quantization means there.
    """

    def add(command: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(command)
        def with_config(**arguments: Any) -> Any:
            names = ("quantization", "moe", "linear", "ignore", "targets", "no_strict")
            chosen = {name: arguments.pop(name) for name in names}
            return command(config=config_of(**chosen), **arguments)

        named = click.option("--quantization", "-q", help=quantization)
        return named(refinement_options(with_config))

    return add


def configs_of(
    quantization: str | None, moe: str | None, linear: str | None, **others: Any
) -> dict[str, OnlineQuantizationConfig]:
    """By the names that were given; "as asked" where only kinds of layers or targets were; every
    scheme where nothing names one, as far as "none" leaves it something to quantize."""
    from moeq.errors import ConfigError
    from moeq.schemes import LAYER_KINDS, OnlineQuantScheme

    def config(name: str) -> OnlineQuantizationConfig:
        found = config_of(quantization=name, moe=moe, linear=linear, **others)
        assert found is not None
        return found

    if quantization is not None:
        names = [name.strip() for name in quantization.split(",")]
        for name in names:
            if not name or names.count(name) > 1:
                raise ConfigError(
                    f"--quantization {quantization!r}: {name!r} is empty or comes twice"
                )
        return {name: config(name) for name in names}
    if others["targets"] or any(kind not in (None, "none") for kind in (moe, linear)):
        asked = config_of(quantization=None, moe=moe, linear=linear, **others)
        assert asked is not None
        return {"as asked": asked}
    said = {"moe": moe, "linear": linear}
    kept = [kind for kind in LAYER_KINDS if said[kind] is None]
    schemes = [s for s in OnlineQuantScheme if any(s.covers(kind) for kind in kept)]
    if not schemes:
        raise ConfigError("--moe none and --linear none leave nothing to quantize")
    return {scheme.value: config(scheme.value) for scheme in schemes}


def config_of(
    quantization: str | None,
    moe: str | None,
    linear: str | None,
    ignore: tuple[str, ...],
    targets: tuple[str, ...],
    no_strict: bool,
) -> OnlineQuantizationConfig | None:
    """None where nothing was given."""
    from moeq.config import OnlineQuantizationConfig
    from moeq.errors import ConfigError

    pairs = {}
    for target in targets:
        pattern, sign, scheme = target.rpartition("=")
        if not sign or not pattern:
            raise ConfigError(f"target {target!r} has no =SCHEME", hint="expected PATTERN=SCHEME")
        pairs[pattern] = scheme
    if quantization is not None and quantization.endswith(".json"):
        if moe or linear or ignore or pairs:
            raise ConfigError(
                f"{quantization} is a whole config", hint="write what is to change into the file"
            )
        config = OnlineQuantizationConfig.from_json(quantization)
        config.strict = config.strict and not no_strict
        return config
    if not (quantization or moe or linear or pairs):
        for name, given in (("--ignore", ignore), ("--no-strict", no_strict)):
            if given:
                raise ConfigError(f"{name} without a scheme", hint="add --quantization NAME")
        return None
    return OnlineQuantizationConfig(
        quantization, moe=moe, linear=linear, ignore=ignore, targets=pairs, strict=not no_strict
    )


def quiet_transformers() -> None:
    """We show one bar of our own."""
    from transformers.utils import logging

    logging.disable_progress_bar()
