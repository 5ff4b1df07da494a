"""The text that models are compared on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from moeq.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

_HINT = "--text takes a file of plain UTF-8 text"

_CHARACTERS = 32
"""A token at most, about: to tokenize megabytes of which some pages are used takes seconds."""


def ids_of(folder: Path, text: Path | None, tokens: int) -> tuple[str, Tensor]:
    """What the text is called, and its first token ids [N], N <= tokens.

    Args:
        folder: of the model, whose tokenizer is used.
        text: a file; None for the embedded model's held-out text.
        tokens: at most.

    Raises:
        ConfigError: no text, or none that can be read.
        CheckpointError: no tokenizer.
    """
    from moeq.embedded import held_out_text, model_folder
    from moeq.engines.load import check_folder, load_tokenizer

    check_folder(folder)
    if text is not None:
        source, words = text.name, _read(text)
    elif folder.resolve() == model_folder().resolve():
        source, words = "held-out text of the embedded model", held_out_text()
    else:
        raise ConfigError(
            "no text to compare on",
            hint="--text FILE: some pages of what the model is used for",
        )
    tokenizer = load_tokenizer(folder)
    some = words[: _CHARACTERS * tokens]
    ids: Tensor = tokenizer(some, return_tensors="pt", verbose=False)["input_ids"]
    return source, ids[0, :tokens]


def _read(text: Path) -> str:
    try:
        words = text.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise ConfigError(f"{text}: {error.strerror}", hint=_HINT) from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{text}: not UTF-8 text (byte {error.start})", hint=_HINT) from None
    if "\0" in words:
        raise ConfigError(f"{text}: binary (character {words.index(chr(0))} is 0)", hint=_HINT)
    if not words.strip():
        raise ConfigError(f"{text}: empty", hint=_HINT)
    return words
