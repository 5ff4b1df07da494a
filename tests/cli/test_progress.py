"""Progress without a terminal: a line every five seconds and no more."""

from __future__ import annotations

import pytest

from moeq.cli import progress


def test_a_line_every_five_seconds(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = 100.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock)
    with progress.bytes_bar("loading model") as advance:
        for clock in (101.0, 104.9, 105.0, 105.1, 109.0, 110.5):
            advance(int(clock) * 1_000_000, 200_000_000)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [
        "loading model: 105 of 200 MB",
        "loading model: 110 of 200 MB",
    ]
