"""How tensors are kept out of transformers' hands: an entry of its own table that claims them."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.core_model_loading import ConversionOps, WeightConverter


class ClaimingConverter(WeightConverter):  # type: ignore[misc]
    """An entry of transformers' table that claims the tensors we read ourselves.

    transformers asks every entry in turn where a key goes (`rename_source_key`), collects the keys
    of one parameter in a copy of the entry, and calls `convert` on it. This one knows its keys by
    name, and never touches what was collected.
    """

    __slots__ = ("claims",)

    _PATTERN = "moeq.claimed"
    _was_used: bool

    def __init__(self, claims: dict[str, str]) -> None:
        super().__init__([self._PATTERN], [self._PATTERN], [_Keep()])
        self.claims = claims

    def __deepcopy__(self, memo: dict[int, Any]) -> ClaimingConverter:
        return self  # transformers copies it for every key, and all copies would be the same

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        parameter = self.claims.get(source_key)
        if parameter is None:
            return source_key, None
        self._was_used = True  # type: ignore[misc]  # a slot of the base class
        return parameter, self.source_patterns[0]

    def convert(
        self,
        layer_name: str,
        model: Any = None,
        config: Any = None,
        hf_quantizer: Any = None,
        loading_info: Any = None,
    ) -> dict[str, Tensor]:
        self.collected_tensors.clear()
        tensors: dict[str, Tensor]
        tensors, done = hf_quantizer.load_parameter(layer_name)
        loading_info.missing_keys.difference_update(done)
        return tensors


class _Keep(ConversionOps):  # type: ignore[misc]
    """A converter must list an operation; ours is never run."""

    def convert(self, input_dict: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        return input_dict
