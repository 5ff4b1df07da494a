"""The embedded model: a small real MoE language model of Python source, and text it never saw.

`examples/train_tiny_python.py` trained it on the standard library of CPython; its README tells how.
The held-out text is not shipped: it is read from the standard library of the Python that runs, so
its perplexity differs a little between versions of Python, and only numbers of one machine compare.
"""

from __future__ import annotations

import sysconfig
from pathlib import Path

from moeq.errors import DependencyError

HELD_OUT = (
    "bisect.py",
    "cmd.py",
    "graphlib.py",
    "heapq.py",
    "queue.py",
    "sched.py",
    "shelve.py",
    "textwrap.py",
)
"""Modules of the standard library that training left out, with their tests."""

PROMPT = "def fibonacci(n):"
"""No newline at the end: the tokenizer merges it with the indentation that follows."""


def model_folder() -> Path:
    """The checkpoint as hub checkpoints are: config, per-expert tensors in shards, tokenizer."""
    return Path(__file__).parent / "tiny_python"


def held_out_text() -> str:
    """The held-out modules, one after the other.

    Raises:
        DependencyError: this Python comes without the sources of its standard library.
    """
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    missing = [name for name in HELD_OUT if not (stdlib / name).is_file()]
    if missing:
        raise DependencyError(
            f"{stdlib} has no {missing[0]}: this Python comes without its library's sources",
            hint="run moeq with a Python that has them, such as the distribution's python3",
        )
    return "\n".join((stdlib / name).read_text(encoding="utf-8") for name in HELD_OUT)
