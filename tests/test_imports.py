"""What may import what, what importing moeq costs, and the names that it promises."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import moeq

PACKAGE = Path(moeq.__file__).parent

LAYERS = (
    "errors",
    "memory",
    "schemes",
    "span",
    "int4",
    "mxfp4",
    "four_bits",
    "experts",
    "quantize",
    "kernels",
    "oracle",
    "ops",
    "methods",
    "config",
    "checkpoint",
    "plan",
    "report",
    "fidelity",
    "embedded",
    "engines",
    "cli",
)
"""A module imports modules of its own layer and of those above it in this list, and no others."""

UPWARD = {
    # transformers asks a config for its quant_method before it looks for the quantizer of that
    # name: the only moment at which ours can still be registered without registering at import.
    ("config", "engines", "quant_method"),
}
"""(layer, imported layer, function) that may be the other way round."""

EVERY_MODULE = pytest.mark.parametrize(
    "path",
    sorted(PACKAGE.rglob("*.py")),
    ids=lambda path: path.relative_to(PACKAGE).as_posix(),
)


def layer_of(path: Path) -> str:
    """ "methods" for methods/base.py; "" for the package's own __init__.py, the facade."""
    first = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return "" if first == "__init__" else first


def imported_modules(node: ast.Import | ast.ImportFrom, path: Path) -> list[str]:
    """Full names of what a statement imports: modules, or names in them."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    base = node.module or ""
    if node.level:
        folder = ("moeq", *path.relative_to(PACKAGE).parts[:-1])
        base = ".".join([*folder[: len(folder) - node.level + 1], *base.split(".")]).rstrip(".")
    return [f"{base}.{alias.name}" for alias in node.names]


def imports(tree: ast.AST, path: Path, function: str = "") -> Iterator[tuple[str, str, int]]:
    """(full name, innermost function, line) of everything imported, at whatever depth."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from ((name, function, node.lineno) for name in imported_modules(node, path))
        named = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        yield from imports(node, path, node.name if named else function)


def moeq_imports(source: str, path: Path) -> Iterator[tuple[str, str, int]]:
    """(layer, function, line); layer "" for the facade, as in `from moeq import __version__`."""
    for name, function, line in imports(ast.parse(source), path):
        top, _, rest = name.partition(".")
        if top == "moeq":
            layer = rest.partition(".")[0]
            yield ("" if layer in ("", "__version__") else layer), function, line


def upward_imports(source: str, path: Path) -> list[str]:
    """Imports that point the wrong way, as `file:line: imports layer`."""
    own = layer_of(path)
    wrong = []
    for layer, function, line in moeq_imports(source, path):
        if own == "" or (layer == "" and own == "cli") or (own, layer, function) in UPWARD:
            continue
        if layer == "" or LAYERS.index(layer) > LAYERS.index(own):
            wrong.append(f"{path.name}:{line}: imports {layer or 'the facade'}")
    return wrong


def test_every_module_has_its_place_among_the_layers() -> None:
    assert {layer_of(path) for path in PACKAGE.rglob("*.py")} == {"", *LAYERS}


@EVERY_MODULE
def test_imports_point_one_way(path: Path) -> None:
    assert upward_imports(path.read_text(encoding="utf-8"), path) == []


def test_the_exceptions_are_needed() -> None:
    found = {
        (layer_of(path), layer, function)
        for path in PACKAGE.rglob("*.py")
        for layer, function, _ in moeq_imports(path.read_text(encoding="utf-8"), path)
    }
    assert found >= UPWARD


@pytest.mark.parametrize(
    ("path", "source", "wrong"),
    [
        ("schemes.py", "from moeq.errors import MoeqError", 0),
        ("schemes.py", "import moeq.experts", 1),
        ("schemes.py", "from moeq import experts, errors", 1),
        ("kernels/cpu.py", "from moeq.kernels import activations", 0),
        ("kernels/cpu.py", "def f():\n    from moeq.ops import linear", 1),
        ("kernels/cpu.py", "from ..ops import linear", 1),
        ("kernels/cpu.py", "from .. import ops", 1),
        ("kernels/cpu.py", "from . import activations", 0),
        ("config.py", "def other():\n    from moeq.engines import register", 1),
        ("config.py", "def quant_method():\n    from moeq.engines import register", 0),
        ("plan.py", "from moeq import __version__", 1),
        ("cli/main.py", "from moeq import __version__", 0),
        ("errors.py", "if TYPE_CHECKING:\n    from moeq.config import Config", 1),
        ("errors.py", "import torch, moeqlike.cli", 0),
    ],
)
def test_this_finds_imports_that_point_the_wrong_way(path: str, source: str, wrong: int) -> None:
    assert len(upward_imports(source, PACKAGE / path)) == wrong


def in_a_fresh_python(code: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(PACKAGE.parent)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def test_importing_moeq_imports_nothing_heavy() -> None:
    heavy = ("torch", "triton", "transformers", "vllm", "numpy")
    code = f"import sys, moeq; print([m for m in {heavy} if m in sys.modules], len(dir(moeq)))"
    assert in_a_fresh_python(code) == f"[] {len(moeq.__all__) + 1}"


def test_a_config_can_be_made_without_an_engine() -> None:
    code = (
        "import sys, moeq; moeq.OnlineQuantizationConfig('fp8_per_block').to_dict();"
        "print([m for m in ('triton', 'transformers', 'vllm') if m in sys.modules])"
    )
    assert in_a_fresh_python(code) == "[]"


def test_these_are_the_public_names() -> None:
    assert moeq.__all__ == [
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
    assert dir(moeq) == sorted([*moeq.__all__, "__version__"])


@pytest.mark.parametrize("name", moeq.__all__)
def test_a_public_name_is_what_its_home_defines(name: str) -> None:
    found = getattr(moeq, name)
    assert found.__name__ == name
    assert found.__module__ == moeq._HOMES[name]
    assert found.__doc__


def test_other_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="module 'moeq' has no attribute 'quantise'"):
        moeq.quantise  # noqa: B018
