"""Damaged inputs: a clean refusal or a right result, 500 times."""

import shutil
from pathlib import Path

import pytest

from robust.campaign import campaign, run_command
from robust.corpus import COMMANDS, build
from robust.verdicts import faults


def test_every_command_runs_on_the_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    places = build(tmp_path / "corpus")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in COMMANDS:
        code, said, found = run_command(name, places, tmp_path / "out")
        assert (code, found) == (0, []), f"{name}: {said}"
        assert not faults(name, code, said, tmp_path / "out", places)
        assert ("OUT" in COMMANDS[name][1]) == (tmp_path / "out").exists()
        shutil.rmtree(tmp_path / "out", ignore_errors=True)


def test_damaged_inputs_are_refused_or_understood(tmp_path: Path) -> None:
    results = list(campaign(tmp_path, range(500), seed=0))
    assert len(results) == 500
    assert not [(r.case, r.what, r.faults) for r in results if r.faults]
    assert {r.code for r in results} == {0, 1}
