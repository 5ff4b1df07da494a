"""The second load reads what the first one made, or makes it again; never anything else."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

import moeq
import moeq.engines.load as loading
from moeq.checkpoint import cache
from moeq.checkpoint.writer import MANIFEST_NAME
from moeq.engines.hf_stream import LayerStream
from moeq.errors import CheckpointError, ConfigError
from tests.engines.test_refresh import saved
from tests.engines.tools import FP8, INT8, QWEN, amend, assert_same_state, load, rewrite


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MOEQ_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return saved(QWEN, tmp_path / "model", 1)


@pytest.fixture
def quantized(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Grows with every load that quantizes."""
    calls: list[Any] = []
    run = LayerStream.run

    def counted(self: LayerStream, *args: Any) -> None:
        calls.append(self)
        run(self, *args)

    monkeypatch.setattr(LayerStream, "run", counted)
    return calls


def names() -> list[str]:
    return [entry.name for entry in cache.entries()]


def test_the_second_load_quantizes_nothing_and_is_the_same(
    source: Path, quantized: list[Any]
) -> None:
    first = moeq.load(source, INT8, cache=True)
    second = moeq.load(source, INT8, cache=True)
    assert len(quantized) == 1
    assert any("kept in the cache" in note for note in moeq.report_of(first).notes)
    assert any("from the cache" in note for note in moeq.report_of(second).notes)
    assert_same_state(second, first)
    assert_same_state(second, load(source, QWEN, INT8))
    (name,) = names()
    assert name.startswith("model.")
    ids = torch.arange(9)[None]
    assert torch.equal(first(ids).logits, second(ids).logits)


def test_without_being_asked_nothing_is_kept(source: Path, folder: Path) -> None:
    moeq.load(source, INT8)
    assert not folder.exists()


def test_whatever_decides_the_result_decides_the_entry(
    source: Path, tmp_path: Path, quantized: list[Any]
) -> None:
    moeq.load(source, INT8, cache=True)
    moeq.load(source, FP8, cache=True)
    moeq.load(source, moeq.OnlineQuantizationConfig(FP8, linear="none"), cache=True)
    moeq.load(source, INT8, cache=True, dtype=torch.float32)
    amend(source, {"rms_norm_eps": 1e-3})
    moeq.load(source, INT8, cache=True)
    (source / "generation_config.json").write_text('{"top_k": 7}')
    assert moeq.load(source, INT8, cache=True).generation_config.top_k == 7
    saved(QWEN, source, 2)  # other weights under the same names
    found = moeq.load(source, INT8, cache=True)
    assert len(quantized) == len(names()) == 7
    assert_same_state(found, load(source, QWEN, INT8))


def test_other_weights_in_a_file_that_looks_the_same(source: Path, quantized: list[Any]) -> None:
    moeq.load(source, INT8, cache=True)
    file = source / "model.safetensors"
    before, raw = file.stat(), bytearray(file.read_bytes())
    raw[-2] ^= 1
    with open(file, "r+b") as handle:
        handle.write(raw)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    moeq.load(source, INT8, cache=True)
    assert len(quantized) == 2


def test_a_config_for_from_pretrained_does_not_hide_that_the_entry_is_quantized(
    source: Path,
) -> None:
    for _ in range(2):
        config = AutoConfig.from_pretrained(source, num_experts_per_tok=1)
        model = moeq.load(source, INT8, cache=True, config=config)
        assert model.config.num_experts_per_tok == 1
        assert not hasattr(config, "quantization_config")
        assert_same_state(model, load(source, QWEN, INT8))


def test_the_tokenizer_is_that_of_the_source(source: Path, tmp_path: Path) -> None:
    (source / "tokenizer.json").write_text("old")
    for _ in range(2):
        model = moeq.load(source, INT8, cache=True)
        assert model.name_or_path == model.config.name_or_path == str(source)
    (source / "tokenizer.json").write_text("new")
    cache.clear([])
    moeq.save(model, tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "new"


def test_what_cannot_be_saved_is_not_cached(source: Path) -> None:
    for _ in range(2):
        with pytest.warns(UserWarning, match="not cached: the model was not quantized by moeq"):
            model, told = moeq.load(source, INT8, cache=True, output_loading_info=True)
        assert not told["missing_keys"]
        assert_same_state(model, load(source, QWEN, INT8))


def damage_codes(entry: Path) -> None:
    (file,) = entry.glob("*.safetensors")
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(bytes(raw))


def cut_off(entry: Path) -> None:
    (file,) = entry.glob("*.safetensors")
    os.truncate(file, file.stat().st_size - 1)


def without_manifest(entry: Path) -> None:
    (entry / MANIFEST_NAME).unlink()


def other_config(entry: Path) -> None:
    amend(entry, {"rms_norm_eps": 0.5})


def deep_manifest(entry: Path) -> None:
    (entry / MANIFEST_NAME).write_text("[" * 100_000)


def a_file_more(entry: Path) -> None:
    (entry / "model.safetensors").write_bytes(b"")


@pytest.mark.parametrize(
    "damage", [damage_codes, cut_off, without_manifest, deep_manifest, other_config, a_file_more]
)
def test_a_damaged_entry_is_set_aside_and_made_again(
    damage: Any, source: Path, folder: Path, quantized: list[Any]
) -> None:
    moeq.load(source, INT8, cache=True)
    (name,) = names()
    damage(folder / name)
    with pytest.warns(UserWarning, match=rf"kept as {name}\.damaged, and made again"):
        found = moeq.load(source, INT8, cache=True)
    assert len(quantized) == 2
    assert_same_state(found, load(source, QWEN, INT8))
    assert [(e.name, e.is_damaged) for e in cache.entries()] == [
        (name, False),
        (f"{name}.damaged", True),
    ]
    moeq.load(source, INT8, cache=True)
    assert len(quantized) == 3  # one of them the comparison above


def test_a_cache_that_cannot_be_written_costs_only_itself(
    source: Path, folder: Path, quantized: list[Any]
) -> None:
    folder.write_text("a file, where a folder should be")
    with pytest.warns(UserWarning, match=r"not cached: .*cache"):
        model = moeq.load(source, INT8, cache=True)
    assert_same_state(model, load(source, QWEN, INT8))


def test_a_damaged_entry_that_stays_costs_only_itself(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moeq.load(source, INT8, cache=True)
    (name,) = names()
    cut_off(cache.cache_folder() / name)

    def refuse(self: Path, target: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.warns(UserWarning, match="not cached: .*Permission denied"):
        model = moeq.load(source, INT8, cache=True)
    assert_same_state(model, load(source, QWEN, INT8))


def test_a_home_that_nobody_knows_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOEQ_CACHE", "~nobody-of-this-name/cache")
    with pytest.raises(CheckpointError, match="no folder for a cache"):
        cache.entries()


def test_a_full_disk_costs_only_the_entry(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise CheckpointError("no space left")

    monkeypatch.setattr("moeq.engines.load.save", full)
    with pytest.warns(UserWarning, match="not cached: no space left"):
        moeq.load(source, INT8, cache=True)
    assert names() == []


def test_a_failing_load_leaves_no_entry(source: Path) -> None:
    os.truncate(source / "model.safetensors", 100)
    with pytest.raises(CheckpointError):
        moeq.load(source, INT8, cache=True)
    assert names() == []


def test_what_was_dropped_for_one_stays_an_error_for_others(source: Path) -> None:
    rewrite(source, lambda tensors: tensors.update({"model.extra.weight": torch.ones(3)}))
    moeq.load(source, moeq.OnlineQuantizationConfig(INT8, strict=False), cache=True)
    with pytest.raises(CheckpointError, match=r"model\.extra\.weight"):
        moeq.load(source, INT8, cache=True)


def test_a_backend_of_ones_own_is_refused(source: Path) -> None:
    config = moeq.OnlineQuantizationConfig(INT8, backend="reference")
    with pytest.raises(ConfigError, match="no backend with a cache"):
        moeq.load(source, config, cache=True)


def test_two_processes_make_one_entry(source: Path, folder: Path) -> None:
    program = (
        "import sys, moeq\n"
        "from moeq.engines.hf_stream import LayerStream\n"
        "run, made = LayerStream.run, []\n"
        "LayerStream.run = lambda self, *a: (made.append(1), run(self, *a))\n"
        f"moeq.load({str(source)!r}, {INT8!r}, cache=True)\n"
        "print(len(made))\n"
    )
    processes = [
        subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    made = [int(process.communicate()[0].split()[-1]) for process in processes]
    assert sorted(made) == [0, 1]
    assert [entry.is_damaged for entry in cache.entries()] == [False]
    assert not list(folder.glob("*.partial"))


def test_clear_removes_what_is_named_or_all(source: Path, folder: Path) -> None:
    moeq.load(source, INT8, cache=True)
    moeq.load(source, FP8, cache=True)
    first, second = names()
    assert [entry.name for entry in cache.clear([first])] == [first]
    assert names() == [second]
    with pytest.raises(CheckpointError, match="no such entry"):
        cache.clear(["other"])
    with pytest.raises(CheckpointError, match="no such entry"):
        cache.clear([f"../cache/{second}"])
    (folder / f".{first}.123.partial").mkdir()
    assert [entry.name for entry in cache.clear([])] == [second]
    assert list(folder.iterdir()) == []


def test_clear_leaves_what_is_not_the_caches(source: Path, folder: Path) -> None:
    moeq.load(source, INT8, cache=True)
    for other in ("photos", "photos.2024", ".photos.1.partial"):
        (folder / other).mkdir()
        (folder / other / "file").write_text("mine")
    (folder / ".photos.lock").write_text("")
    (name,) = names()
    with pytest.raises(CheckpointError, match="no such entry"):
        cache.clear(["photos"])
    assert [entry.name for entry in cache.clear([])] == [name]
    left = {path.name for path in folder.iterdir()}
    assert left == {"photos", "photos.2024", ".photos.1.partial", ".photos.lock"}


def test_clear_goes_on_from_one_that_was_killed(source: Path, folder: Path) -> None:
    moeq.load(source, INT8, cache=True)
    (name,) = names()
    (folder / f".{name}.removed" / "rest").mkdir(parents=True)
    assert [entry.name for entry in cache.clear([name])] == [name]
    assert names() == []
    assert not list(folder.glob("*.removed"))


def test_an_entry_is_not_cleared_while_it_is_read(
    source: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moeq.load(source, INT8, cache=True)
    real = loading._load

    def while_cleared(*args: Any) -> Any:
        assert cache.clear([]) == []
        return real(*args)

    monkeypatch.setattr(loading, "_load", while_cleared)
    moeq.load(source, INT8, cache=True)
    assert len(names()) == 1


def test_what_a_killed_maker_left_goes_when_the_entry_is_made(source: Path, folder: Path) -> None:
    moeq.load(source, INT8, cache=True)
    (name,) = names()
    (folder / name).rename(folder / f".{name}.1.partial")
    moeq.load(source, INT8, cache=True)
    assert names() == [name]
    assert not list(folder.glob(".*.partial"))


def test_clear_leaves_what_somebody_makes(source: Path, folder: Path) -> None:
    moeq.load(source, INT8, cache=True)
    (name,) = names()
    with cache.making(folder / name):
        (folder / f".{name}.1.partial").mkdir()
        assert cache.clear([]) == []
        assert (folder / f".{name}.1.partial").is_dir()
    assert names() == [name]


def test_who_waits_is_told(folder: Path) -> None:
    with cache.making(folder / "x"), warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="waiting for another process"):
            cache.making(folder / "x").__enter__()


def test_the_hubs_folders_give_their_names(source: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--owner--name" / "snapshots" / "0123abcd"
    snapshot.parent.mkdir(parents=True)
    source.rename(snapshot)
    assert cache.entry_name(snapshot, {}).startswith("owner--name.")


def test_the_commands(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from moeq.cli import cli

    moeq.load(source, INT8, cache=True)
    (name,) = names()
    cli(["cache", "list"], standalone_mode=False)
    assert name in capsys.readouterr().out
    cli(["cache", "list", "--json"], standalone_mode=False)
    assert json.loads(capsys.readouterr().out)["entries"][0]["name"] == name
    cli(["cache", "clear", "--json"], standalone_mode=False)
    assert json.loads(capsys.readouterr().out)["removed"][0]["name"] == name
    assert names() == []
