"""Saving and quantizing while the machine fails: killed, out of room, unreadable, changed.

Each attempt runs in a forked child, where every operation that changes a disk is a step; a fault
happens in its place, or inside a write once a file has so many bytes. Whatever happens, what was
there stays, and the output is whole or absent.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import resource
import shutil
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors import torch as safetensors_torch
from transformers import modeling_utils

import moeq
from moeq.cli import main
from moeq.engines.hf_stream import LayerStream
from moeq.errors import MoeqError
from tests.corpus.cases import FIRST, SHARD
from tests.corpus.conftest import digests, names
from tests.engines.tools import INT8, assert_same_state

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="children are forked"),
    # Ours have no threads at that time but idle ones
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
]

Work = Callable[[Path], None]
"""Writes a folder."""

Fault = Callable[[], None]

LEFT = re.compile(r"\.out\.[0-9a-f]{8}\.partial")
"""What a killed process may leave."""

CHANGES = {"os.mkdir", "os.rename", "os.chmod", "os.truncate"}
"""Events by which Python tells of an operation on a disk, besides "open". Removing is none: nothing
is removed before something failed, and a full disk does not keep anybody from it."""

KILLED = 9


class Steps:
    """Counts operations that change a folder, and puts a fault in the place of one.

    Args:
        folder: that is looked at.
        at: the number of the operation, from 1 on; 0 for none.
        fault: called then, and for all that come later.
    """

    def __init__(self, folder: Path, at: int = 0, fault: Fault = lambda: None) -> None:
        self._folder = str(folder)
        self._at, self._fault = at, fault
        self.count = 0

    def install(self) -> None:
        """For the rest of this process."""
        sys.addaudithook(self._hear)
        for module, name in (
            (os, "fsync"),
            (os, "posix_fallocate"),
            (safetensors_torch, "save_file"),
            (modeling_utils, "safe_save_file"),
            (LayerStream, "_use"),
        ):
            setattr(module, name, self._before(getattr(module, name)))

    def _before(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def called(*args: Any, **kwargs: Any) -> Any:
            self._step()
            return function(*args, **kwargs)

        return called

    def _hear(self, event: str, args: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = args
            writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        else:
            path, writes = (args or ("",))[0], event in CHANGES
        if writes and str(path).startswith(self._folder):
            self._step()

    def _step(self) -> None:
        self.count += 1
        if self._at and self.count >= self._at:
            self._fault()


def die() -> None:
    os._exit(KILLED)


def fill_up() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def in_child(work: Callable[[], None]) -> tuple[int, str]:
    """The exit code of a process that does `work`, negative for a signal, and what it printed."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            sys.stdout = sys.stderr = os.fdopen(write, "w")
            work()
            code = 0
        except SystemExit as exit_:
            code = int(exit_.code or 0)
        except MoeqError as error:
            print(f"error: {error.message}\nhint: {error.hint}")
            code = error.exit_code
        except BaseException:  # noqa: BLE001  # the child ends here
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)
    os.close(write)
    with open(read) as text:
        printed = text.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), printed


def quantize(model: Path, out: Path) -> None:
    sys.argv = ["moeq", "quantize", str(model), "-q", INT8, "--out", str(out)]
    main()


@pytest.fixture(params=["save", "save in shards", "quantize"])
def work(request: pytest.FixtureRequest, good: Path) -> Work:
    """Every way to write a folder."""
    if request.param == "quantize":
        return lambda out: quantize(good / "shards", out)
    model = moeq.load(good / "shards", INT8)
    size = "20KB" if request.param == "save in shards" else "5GB"
    return lambda out: moeq.save(model, out, max_shard_size=size)


@pytest.fixture
def expected(work: Work, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What it writes when nothing fails."""
    out = tmp_path_factory.mktemp("expected") / "out"
    assert in_child(lambda: work(out)) == (0, "") or names(out)
    return out


def steps_of(work: Work, folder: Path) -> int:
    """How many there are."""

    def counted() -> None:
        steps = Steps(folder)
        steps.install()
        work(folder / "counted")
        print(f"\nsteps {steps.count}")

    code, printed = in_child(counted)
    assert code == 0, printed
    shutil.rmtree(folder / "counted")
    return int(printed.rsplit("steps ", 1)[1])


def check_left(folder: Path, expected: Path) -> None:
    """`out` is whole or absent; beside it is at most one folder, which loads as `out` or not."""
    left = {path.name for path in folder.iterdir()}
    if "out" in left:
        assert contents(folder / "out") == contents(expected)
    partial = [name for name in left - {"out"} if LEFT.fullmatch(name)]
    assert len(partial) <= 1
    assert left <= {"out", *partial}
    for name in partial:
        with contextlib.suppress(MoeqError):
            assert_same_state(moeq.load(folder / name), moeq.load(expected))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("into", ["nothing", "an empty folder"])
def test_killed_before_any_operation(
    into: str, work: Work, expected: Path, good: Path, tmp_path: Path
) -> None:
    before = digests(good)
    folder = tmp_path / "outputs"
    folder.mkdir()
    count = steps_of(work, folder)
    assert count > 10
    for number in range(1, count + 1):
        if into == "an empty folder":
            (folder / "out").mkdir()

        def killed(at: int = number) -> None:
            Steps(folder, at, die).install()
            work(folder / "out")

        assert in_child(killed)[0] == KILLED
        if (folder / "out").exists() and not names(folder / "out"):
            (folder / "out").rmdir()
        check_left(folder, expected)
        if not (folder / "out").exists():
            code, printed = in_child(lambda: work(folder / "out"))
            assert code == 0, printed
            assert contents(folder / "out") == contents(expected)
        shutil.rmtree(folder)
        folder.mkdir()
    assert digests(good) == before


def sizes(expected: Path) -> Iterator[int]:
    """Bytes at which a write ends, up to one less than the largest file has."""
    largest = max(path.stat().st_size for path in expected.iterdir())
    yield from (0, 1, 7, 8, 100, 1000, 4096, largest // 2, largest - 1)


def limited(size: int, action: signal.Handlers, work: Work, out: Path) -> tuple[int, str]:
    """Does `work` where no file may have more than `size` bytes."""

    def child() -> None:
        signal.signal(signal.SIGXFSZ, action)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
        work(out)

    return in_child(child)


def test_killed_inside_a_write(work: Work, expected: Path, tmp_path: Path) -> None:
    for size in sizes(expected):
        code, printed = limited(size, signal.SIG_DFL, work, tmp_path / "out")
        assert code == -signal.SIGXFSZ, printed
        check_left(tmp_path, expected)
        assert not (tmp_path / "out").exists()
        for path in tmp_path.iterdir():
            shutil.rmtree(path)


def test_the_disk_is_full_inside_a_write(work: Work, expected: Path, tmp_path: Path) -> None:
    for size in sizes(expected):
        code, printed = limited(size, signal.SIG_IGN, work, tmp_path / "deep" / "out")
        assert code == 2, printed
        assert f"error: {tmp_path / 'deep' / 'out'}" in printed
        assert "File too large" in printed
        assert "hint: make room" in printed
        assert not list(tmp_path.iterdir())


def test_the_disk_is_full_before_any_operation(work: Work, tmp_path: Path) -> None:
    count = steps_of(work, tmp_path)
    for number in range(1, count):  # the last is after the folder is there

        def full(at: int = number) -> None:
            Steps(tmp_path, at, fill_up).install()
            work(tmp_path / "out")

        code, printed = in_child(full)
        assert code == 2, printed
        assert f"error: {tmp_path / 'out'}" in printed, printed
        assert "No space left on device" in printed
        assert "hint: make room" in printed
        assert not list(tmp_path.iterdir())


# Reading


@pytest.fixture
def model(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good / "shards", tmp_path / "model"))


def generate(model: Path, out: Path) -> None:
    sys.argv = ["moeq", "generate", str(model), "-q", INT8, "--prompt", "once"]
    main()


def read_fault(number: int, fault: Callable[[Path], None], model: Path) -> None:
    """For the rest of this process: `fault` at every read of bytes from the `number`th on."""
    read, count = os.preadv, 0

    def faulty(*arguments: Any) -> int:
        nonlocal count
        count += 1
        if count >= number:
            fault(model)
        return read(*arguments)

    os.preadv = faulty


def unreadable(model: Path) -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def replaced(model: Path) -> None:
    for shard in (FIRST, SHARD):
        shutil.copy(model / shard, model / f"{shard}.new")
        (model / f"{shard}.new").replace(model / shard)


def overwritten(model: Path) -> None:
    for shard in (FIRST, SHARD):
        with open(model / shard, "r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(b"\0")


@pytest.mark.parametrize("command", [quantize, generate])
@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (unreadable, "Input/output error"),
        (replaced, "changed since its header was read"),
        (overwritten, "changed since its header was read"),
    ],
)
def test_a_shard_fails_while_it_is_read(
    command: Callable[[Path, Path], None],
    number: int,
    fault: Callable[[Path], None],
    says: str,
    model: Path,
    tmp_path: Path,
) -> None:
    before = names(tmp_path)

    def child() -> None:
        read_fault(number, fault, model)
        command(model, tmp_path / "out")

    code, printed = in_child(child)
    assert code == 2, printed
    assert re.search(rf"^error: .*model-0000[12]-of-00002\.safetensors: .*{says}$", printed, re.M)
    assert "hint: " in printed
    assert names(tmp_path) == before


@pytest.mark.parametrize("command", [quantize, generate])
def test_a_file_cannot_be_opened(
    command: Callable[[Path, Path], None], model: Path, tmp_path: Path
) -> None:
    """One of them at a time, each as often as it is opened."""
    before = names(tmp_path)
    for victim in sorted(names(model)):

        def child(path: str = str(model / victim)) -> None:
            def hear(event: str, arguments: tuple[Any, ...]) -> None:
                if event == "open" and str(arguments[0]) == path:
                    raise OSError(errno.EIO, os.strerror(errno.EIO), path)

            sys.addaudithook(hear)
            command(model, tmp_path / "out")

        code, printed = in_child(child)
        assert code == 2, (victim, printed)
        assert re.search(r"^error: .*/model", printed, re.M), printed
        assert "hint: " in printed
        assert names(tmp_path) == before
