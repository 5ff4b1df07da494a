"""Experts of four bits to a weight, with a second scale to a group of columns: `moeq.four_bits`."""

from __future__ import annotations

from typing import ClassVar

from moeq.methods.base import OnlineMoEMethodBase
from moeq.schemes import OnlineQuantScheme


class Int4OnlineMoEMethod(OnlineMoEMethodBase):
    """Integer codes, group scales with three bits of mantissa."""

    scheme: ClassVar[OnlineQuantScheme] = OnlineQuantScheme.INT4_PER_GROUP_WEIGHT_ONLY


class Mxfp4OnlineMoEMethod(OnlineMoEMethodBase):
    """e2m1 codes, group scales that are powers of two."""

    scheme: ClassVar[OnlineQuantScheme] = OnlineQuantScheme.MXFP4_WEIGHT_ONLY
