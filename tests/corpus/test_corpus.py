"""Every bad checkpoint of `cases`, through the real commands, and those that are fine by design."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moeq import load as load_model
from moeq.engines.hf_stream import LayerStream
from moeq.schemes import OnlineQuantScheme
from tests.corpus.cases import CASES, SHARD, Case, Tensors
from tests.corpus.conftest import Run, digests, names
from tests.engines.tools import (
    EXPERT_WEIGHT,
    EXPERTS,
    INT8,
    amend,
    assert_same_state,
    rewrite,
)


def refused(result: tuple[int, str, str], says: tuple[str, ...]) -> None:
    """Exit code 2; an error, a hint and nothing else; all that is to be said, and no escapes."""
    code, out, err = result
    assert code == 2, err
    assert out == ""
    lines = err.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["error", "hint"], err
    assert [part for part in says if part not in err] == [], err
    assert all(line.isprintable() for line in lines)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_bad_checkpoint_is_refused(
    case: Case, good: Path, tmp_path: Path, moeq: Run, request: pytest.FixtureRequest
) -> None:
    model = tmp_path / "model"
    shutil.copytree(good / ("shards" if case.in_shards else "whole"), model)
    case.damage(model)
    before = names(tmp_path)
    if case.from_headers:
        request.getfixturevalue("nothing_allocated")
        refused(moeq("plan", model), case.says)
    refused(moeq("quantize", model, "-q", INT8, "--out", tmp_path / "out"), case.says)
    refused(moeq("generate", model, "-q", INT8, "--prompt", "once"), case.says)
    assert names(tmp_path) == before


def quantized(model: Path, out: Path, moeq: Run, scheme: str = INT8) -> tuple[Any, str]:
    """What `moeq quantize` makes of a folder, loaded, and what it said."""
    code, _, err = moeq("quantize", model, "-q", scheme, "--out", out)
    assert code == 0, err
    return load_model(out), err


def test_39_a_row_of_zeros_gets_scale_one(good: Path, tmp_path: Path, moeq: Run) -> None:
    model = shutil.copytree(good / "whole", tmp_path / "model")
    rewrite(model, lambda tensors: tensors[EXPERT_WEIGHT][7].zero_())
    experts = quantized(model, tmp_path / "out", moeq)[0].get_submodule(EXPERTS)
    assert experts.w13_scale[3, 7] == 1
    assert not experts.w13_codes[3, 7].any()


@pytest.mark.parametrize("scheme", OnlineQuantScheme, ids=lambda scheme: scheme.value)
def test_40_an_expert_of_zeros_is_warned_of(
    scheme: OnlineQuantScheme, good: Path, tmp_path: Path, moeq: Run
) -> None:
    model = shutil.copytree(good / "whole", tmp_path / "model")

    def damage(tensors: Tensors) -> None:
        for name in tensors:
            if name.startswith(f"{EXPERTS}.2."):
                tensors[name].zero_().neg_()  # -0 too is nothing

    rewrite(model, damage)
    warning = f"warning: {EXPERTS}: every weight is zero in expert 2\n"
    found, err = quantized(model, tmp_path / "out", moeq, scheme.value)
    assert err == warning
    assert found.get_submodule(EXPERTS).w2_scale[2].eq(1).all()
    code, _, err = moeq("generate", model, "-q", scheme.value, "--prompt", "once")
    assert (code, err.count(warning)) == (0, 1), err


def test_42_widths_that_no_block_divides_get_a_narrower_last_one(
    good: Path, tmp_path: Path, moeq: Run
) -> None:
    found, _ = quantized(good / "whole", tmp_path / "out", moeq, "fp8_per_block")
    experts = found.get_submodule(EXPERTS)
    assert experts.w13_codes.shape == (4, 48, 32)  # blocks are 128 x 128
    assert experts.w13_scale.shape == (4, 2, 1)


def test_43_what_moeq_quantized_is_not_quantized_again(
    good: Path, tmp_path: Path, moeq: Run
) -> None:
    quantized(good / "whole", tmp_path / "saved", moeq)
    for command in (("quantize", "--out", tmp_path / "out"), ("generate", "--prompt", "once")):
        name, *options = command
        says = (str(tmp_path / "saved"), "already quantized by moeq", "unquantized")
        refused(moeq(name, tmp_path / "saved", "-q", INT8, *options), says)
    assert not (tmp_path / "out").exists()


def test_46_a_head_that_is_tied_may_be_absent(good: Path, tmp_path: Path, moeq: Run) -> None:
    model = shutil.copytree(good / "whole", tmp_path / "model")
    rewrite(model, lambda tensors: tensors.pop("lm_head.weight"))
    says = ("missing from the checkpoint: lm_head.weight", "incomplete")
    refused(moeq("quantize", model, "-q", INT8, "--out", tmp_path / "out"), says)
    amend(model, {"tie_word_embeddings": True})
    found, _ = quantized(model, tmp_path / "out", moeq)
    assert found.lm_head.weight is found.model.embed_tokens.weight
    assert_same_state(found, load_model(model, INT8))


@pytest.mark.parametrize(
    "change",
    [
        lambda file: Path(shutil.copy(file, f"{file}.new")).replace(file),
        lambda file: os.utime(file, ns=(0, 0)),
        lambda file: os.truncate(file, file.stat().st_size - 1),
    ],
    ids=["replaced", "written", "cut off"],
)
def test_47_a_file_that_changed_since_the_plan(
    change: Callable[[Path], None],
    good: Path,
    tmp_path: Path,
    moeq: Run,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tmp_path / "model"
    run = LayerStream.run

    def late(*arguments: Any) -> None:
        change(model / SHARD)
        run(*arguments)

    monkeypatch.setattr(LayerStream, "run", late)
    for name, *options in (("quantize", "--out", tmp_path / "out"), ("generate", "--prompt", "x")):
        shutil.copytree(good / "shards", model)
        says = (SHARD, "changed since its header was read", "start again")
        refused(moeq(name, model, "-q", INT8, *options), says)
        shutil.rmtree(model)
    assert not list(tmp_path.iterdir())


def test_31_links_of_the_hubs_cache_are_followed(good: Path, tmp_path: Path, moeq: Run) -> None:
    snapshot, blobs = tmp_path / "models--a--b/snapshots/0123", tmp_path / "models--a--b/blobs"
    snapshot.mkdir(parents=True)
    shutil.copytree(good / "shards", blobs)
    for blob in blobs.iterdir():
        (snapshot / blob.name).symlink_to(f"../../blobs/{blob.name}")
    quantized(snapshot, tmp_path / "out", moeq)
    (snapshot / "merges.txt").symlink_to("/etc/hostname")
    says = ("merges.txt", "outside of the folder", "copy")
    refused(moeq("quantize", snapshot, "-q", INT8, "--out", tmp_path / "again"), says)


def test_55_code_beside_a_checkpoint_is_never_run(good: Path, tmp_path: Path, moeq: Run) -> None:
    model = shutil.copytree(good / "whole", tmp_path / "model")
    (model / "evil.py").write_text("raise SystemExit('it ran')\n")
    own = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    amend(model, {"auto_map": own})
    quantized(model, tmp_path / "out", moeq)
    amend(model, {"model_type": "evil"})
    says = ("config.json", "no model type 'evil'", "moeq runs no code")
    refused(moeq("quantize", model, "-q", INT8, "--out", tmp_path / "again"), says)


@pytest.mark.usefixtures("nothing_allocated")
def test_61_the_output_is_the_source(good: Path, tmp_path: Path, moeq: Run) -> None:
    model = shutil.copytree(good / "whole", tmp_path / "model")
    (tmp_path / "link").symlink_to(model)
    before = digests(tmp_path)
    for out in (model, tmp_path / "link", tmp_path / "model/../model"):
        refused(moeq("quantize", model, "-q", INT8, "--out", out), (str(out), "exists", "new"))
    assert digests(tmp_path) == before


@pytest.mark.usefixtures("nothing_allocated")
@pytest.mark.parametrize("what", ["folder", "file", "link to nowhere", "file above it", "too long"])
def test_62_the_output_exists(what: str, good: Path, tmp_path: Path, moeq: Run) -> None:
    out = tmp_path / "out"
    if what == "folder":
        out.mkdir()
        (out / "mine").write_text("mine")
    elif what == "link to nowhere":
        out.symlink_to("nowhere")
    else:
        out.write_text("mine")
    if what == "file above it":
        out = out / "deeper"
    if what == "too long":
        out = out.parent / ("x" * 300)
    before = digests(tmp_path)
    says = (str(tmp_path), "too long" if what == "too long" else "exists", "new folder")
    refused(moeq("quantize", good / "whole", "-q", INT8, "--out", out), says)
    assert digests(tmp_path) == before


@pytest.mark.usefixtures("nothing_allocated")
def test_63_the_disk_is_too_small(
    good: Path, tmp_path: Path, moeq: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    says = (str(tmp_path), "0.0 GB free, 0.1 GB needed", "room")
    out = tmp_path / "deep" / "out"
    refused(moeq("quantize", good / "whole", "-q", INT8, "--out", out), says)
    assert not list(tmp_path.iterdir())
