"""vLLM's way in: `vllm serve MODEL --quantization moeq_int8_per_channel_weight_only`.

vLLM calls `register` in each of its processes (entry point `vllm.general_plugins`). It enters one
quantization a scheme, `moeq_` and its name, and `moeq`, which takes everything from a config:

    --hf-overrides '{"quantization_config_dict_json": "{\\"ignore\\": [\\"re:.*layers.0.*\\"]}"}'

This module imports vLLM in `register` alone, so that what is wrong with it is an error and not
a missing plugin.
"""

from __future__ import annotations

import re

from moeq.errors import DependencyError

OLDEST, NEWEST = (0, 26), (0, 33)
"""Versions of vLLM that the plugin takes. Tests run 0.32 on CPUs, 0.26 ran on a GPU; the others
read alike."""

PREFIX = "moeq_"
"""Before a scheme's name, on vLLM's command line."""


def register() -> None:
    """Make moeq's schemes known to vLLM. Safe to call again.

    In a vLLM of another version they are entered too, and refuse when one is chosen: who does
    not use moeq there should not be kept from using vLLM.
    """
    import vllm

    reason = refusal(vllm.__version__)
    if reason is None:
        from moeq.engines.vllm_config import register_configs

        register_configs()
    else:
        _register_refusals(reason)


def refusal(version: str) -> DependencyError | None:
    """Why the plugin does not run in this version of vLLM; None where it does."""
    found = re.match(r"(\d+)\.(\d+)", version)
    if found is not None and OLDEST <= (int(found[1]), int(found[2])) <= NEWEST:
        return None
    first, last = (".".join(map(str, bound)) for bound in (OLDEST, NEWEST))
    return DependencyError(
        f"vLLM {version} is not among the versions that moeq's plugin knows, {first} to {last}",
        hint="install one of those, or serve a checkpoint that `moeq quantize --format"
        " compressed-tensors` made, which needs no plugin",
    )


def names() -> tuple[str, ...]:
    """What `--quantization` takes."""
    from moeq.schemes import OnlineQuantScheme

    return ("moeq", *(PREFIX + scheme.value for scheme in OnlineQuantScheme))


def _register_refusals(reason: DependencyError) -> None:
    from vllm.model_executor.layers.quantization import register_quantization_config
    from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

    class Refusing(QuantizationConfig):  # type: ignore[misc]
        """Raises as soon as vLLM makes one."""

        def __new__(cls, *args: object, **kwargs: object) -> Refusing:
            raise reason

        @classmethod
        def from_config(cls, config: object) -> Refusing:
            raise reason

        @classmethod
        def from_config_dict_json(cls, text: str) -> Refusing:
            raise reason

    for name in names():
        register_quantization_config(name)(Refusing)
