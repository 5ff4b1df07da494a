"""Experts of integer codes, a scale to a row."""

from __future__ import annotations

from typing import ClassVar

from moeq.methods.base import OnlineMoEMethodBase
from moeq.schemes import OnlineQuantScheme


class Int8OnlineMoEMethod(OnlineMoEMethodBase):
    """Weight-only: activations stay in the model's dtype."""

    scheme: ClassVar[OnlineQuantScheme] = OnlineQuantScheme.INT8_PER_CHANNEL_WEIGHT_ONLY


class Int8W8A8OnlineMoEMethod(OnlineMoEMethodBase):
    """Activations become int8 too, one dynamic scale per token."""

    scheme: ClassVar[OnlineQuantScheme] = OnlineQuantScheme.INT8_PER_CHANNEL
