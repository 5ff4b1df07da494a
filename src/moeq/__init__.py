"""moeq quantizes Mixture-of-Experts models while they load.

Importing it imports neither torch, triton, transformers nor vLLM: the public names are looked up
when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moeq.config import OnlineQuantizationConfig
    from moeq.engines import register
    from moeq.engines.evaluate import evaluate
    from moeq.engines.load import load, report_of
    from moeq.engines.refresh import refresh
    from moeq.engines.save import save
    from moeq.errors import MoeqError
    from moeq.report import LoadReport
    from moeq.schemes import OnlineQuantScheme

__version__ = "0.1.0"

_HOMES = {
    "LoadReport": "moeq.report",
    "MoeqError": "moeq.errors",
    "OnlineQuantScheme": "moeq.schemes",
    "OnlineQuantizationConfig": "moeq.config",
    "evaluate": "moeq.engines.evaluate",
    "load": "moeq.engines.load",
    "refresh": "moeq.engines.refresh",
    "register": "moeq.engines",
    "report_of": "moeq.engines.load",
    "save": "moeq.engines.save",
}

__all__ = [
    "LoadReport",
    "MoeqError",
    "OnlineQuantScheme",
    "OnlineQuantizationConfig",
    "evaluate",
    "load",
    "refresh",
    "register",
    "report_of",
    "save",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'moeq' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
