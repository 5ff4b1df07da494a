"""`moeq.save`: a quantized model into a folder that loads without quantizing again.

Weights lie in files that transformers finds only when it is told of them (`variant="moeq"`): who
opens the folder without moeq gets an error, and not codes for weights.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from moeq.checkpoint.folder import VARIANT
from moeq.checkpoint.writer import new_folder
from moeq.engines.hf_modules import order_of_files
from moeq.engines.transformers import MoeqHfQuantizer, saving
from moeq.errors import ModelError

_BESIDE = (
    "tokenizer*.json",
    "tokenizer.model",
    "vocab.*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.*",
    "*.tiktoken",
    "tekken.json",
    "spiece.model",
    "preprocessor_config.json",
    "processor_config.json",
)
"""What else belongs to a model, taken along from where it was loaded."""


def save(model: Any, folder: str | Path, *, max_shard_size: str | int = "5GB") -> None:
    """Write a model that moeq quantized.

    Args:
        model: that moeq loaded.
        folder: new, or empty. It appears once it is whole. The tokenizer comes along if the model
            was loaded from a folder.
        max_shard_size: of a weight file.

    Raises:
        ModelError: moeq did not quantize the model, or it is split over ranks.
        CheckpointError: the folder exists, or its disk is too small.
    """
    quantizer = getattr(model, "hf_quantizer", None)
    if not isinstance(quantizer, MoeqHfQuantizer):
        raise ModelError("the model was not quantized by moeq while it loaded")
    if quantizer.ranks is not None:
        raise ModelError(
            f"the model is split over {quantizer.ranks.count} ranks, none of which has it whole",
            hint="`moeq quantize` writes the same folder from the checkpoint",
        )
    target = Path(folder)
    nbytes = sum(tensor.nbytes for tensor in model.state_dict().values())
    with new_folder(target, nbytes) as staging:
        with saving(), order_of_files(model):
            _save_pretrained(model, staging, max_shard_size)
        source = Path(str(getattr(model, "name_or_path", "")))
        if source.is_dir():
            copy_beside(source, staging)


def _save_pretrained(model: Any, staging: Path, max_shard_size: str | int) -> None:
    try:
        model.save_pretrained(staging, variant=VARIANT, max_shard_size=max_shard_size)
    except SafetensorError as error:
        # "... I/O error: No space left on device (os error 28)" is all that it says of the system's
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1]))) from error


def copy_beside(source: Path, target: Path) -> None:
    """Take a model folder's tokenizer and processors along."""
    for pattern in _BESIDE:
        for path in source.glob(pattern):
            if path.is_file() and not (target / path.name).exists():
                shutil.copyfile(path, target / path.name)
