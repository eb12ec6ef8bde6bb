"""Damaged inputs: a clean refusal or a right result, 500 times."""

from pathlib import Path

from robust.campaign import campaign, undamaged


def test_damaged_inputs_are_refused_or_understood(tmp_path: Path) -> None:
    results = list(campaign(tmp_path, [*undamaged(), *range(500)], seed=0))
    assert not [(r.case, r.what, r.faults) for r in results if r.faults]
    damaged = [r for r in results if r.case >= 0]
    assert len(damaged) == 500 and {r.code for r in damaged} == {0, 1}
