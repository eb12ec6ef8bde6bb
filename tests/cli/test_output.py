"""Where progress is shown, and how."""

import io
import re
import sys

import pytest

from lora_merge.cli.shared import output as shared
from lora_merge.cli.shared.output import Output


def _steps(as_json: bool = False, now: str = "") -> None:
    with Output(as_json).progress("training", 3, lambda: now) as advance:
        for _ in range(3):
            advance()


def test_a_file_gets_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shared, "_SECONDS_BETWEEN_LINES", 0.0)
    _steps(now="loss 0.5")
    out, err = capsys.readouterr()
    assert not out
    assert re.sub(r"\d:\d\d:\d\d", "T", err).splitlines() == [
        f"training: {step} of 3, loss 0.5, T left" for step in (1, 2, 3)
    ]


def test_what_is_quickly_done_has_no_line(capsys: pytest.CaptureFixture[str]) -> None:
    _steps()
    assert capsys.readouterr() == ("", "")


def test_a_json_document_has_no_lines_beside_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shared, "_SECONDS_BETWEEN_LINES", 0.0)
    _steps(as_json=True)
    assert capsys.readouterr() == ("", "")


def test_a_terminal_gets_a_bar_that_says_what_is_now(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    monkeypatch.setenv("TERM", "xterm")
    _steps(now="loss 0.5")
    assert "3/3" in terminal.getvalue() and "loss 0.5" in terminal.getvalue()
