"""What can go wrong, one class per kind.

Every message says what was found and, where it helps, what was expected and where; `hint` says what
to do next. The command line prints `error:` and `hint:` and exits with `exit_code`.
"""

from __future__ import annotations


class MoeqError(Exception):
    """Base of everything moeq raises on purpose."""

    exit_code = 2

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


class ConfigError(MoeqError, ValueError):
    """The quantization configuration cannot mean anything."""


class UnknownSchemeError(ConfigError):
    """No scheme has this name."""


class PatternError(ConfigError):
    """A pattern of `ignore` or `targets` is malformed or matches no layer."""


class CheckpointError(MoeqError):
    """The checkpoint on disk is broken, incomplete, or not what its config says."""


class ModelError(MoeqError):
    """The model cannot be quantized: no experts, or experts that we cannot reach."""


class RefreshError(CheckpointError):
    """New weights for a loaded model are not what it needs."""


class NonFiniteError(MoeqError):
    """A weight holds NaN or Inf."""


class BackendError(MoeqError):
    """No kernel runs this scheme here, or the one that was asked for does not."""


class DependencyError(MoeqError):
    """A package is missing or has a version that moeq does not know."""
