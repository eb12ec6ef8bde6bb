"""Checkpoints of one run: the numbers against dense deltas, the advice on runs made to have it."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

import lora_merge
from builders import SHAPES, adapter_parts, save_adapter, save_parts
from lora_merge.adapters.references import in_order
from lora_merge.analysis.trajectory import trajectory_of
from lora_merge.cli.app import run


def checkpoints(folder: Path, offsets: list[tuple[float, float]], *, start: int = 0) -> list[str]:
    """A run whose deltas are B (A + x P + y Q) with fixed P, Q: a way in a plane."""
    random = torch.Generator().manual_seed(7)
    config, tensors = adapter_parts(seed=1)
    first, second = (
        {n: torch.randn(t.shape, generator=random) / 4 for n, t in tensors.items() if "_A" in n}
        for _ in range(2)
    )
    names = []
    for index, (x, y) in enumerate(offsets):
        moved = {
            n: t + x * first[n] + y * second[n] if n in first else t for n, t in tensors.items()
        }
        # Numbers that do not sort as words do: 500 before 1000.
        where = folder / f"checkpoint-{500 * (start + index + 1)}"
        names.append(str(save_parts(where, config, moved)))
    return names


def dense(name: str) -> Tensor:
    adapter = lora_merge.open_adapter(name)
    parts = []
    for module in SHAPES:
        a, b = adapter.read(module)
        parts.append((adapter.modules[module].scaling * b.double() @ a.double()).flatten())
    return torch.cat(parts)


def test_numbers_are_those_of_the_dense_deltas(tmp_path: Path) -> None:
    names = checkpoints(tmp_path, [(0.0, 0.0), (0.5, 0.1), (0.8, 0.3), (0.9, 0.2)])
    found = trajectory_of(lora_merge.compare(names[::-1]))
    assert found is not None
    deltas = [dense(name) for name in names]
    last = deltas[-1]
    assert [step.name for step in found.steps] == names
    for t, step in enumerate(found.steps):
        before = deltas[max(t - 1, 0)]
        assert step.norm == pytest.approx(float(deltas[t].norm()), rel=1e-5)
        moved = float((deltas[t] - before).norm() / last.norm())
        assert step.moved == pytest.approx(moved, rel=1e-4, abs=1e-6)
        left = float((deltas[t] - last).norm() / last.norm())
        assert step.left == pytest.approx(left, rel=1e-4, abs=2e-3)


def test_a_run_that_goes_on_is_not_averaged(tmp_path: Path) -> None:
    names = checkpoints(tmp_path, [(0.4 * t, 0.0) for t in range(6)])
    found = trajectory_of(lora_merge.compare(names))
    assert found is not None and found.wandering == 0 and found.settled is None
    assert found.straightness == pytest.approx(1, abs=1e-3)
    assert "take the last" in found.reason


def test_a_run_that_circles_is_averaged_from_there_on(tmp_path: Path) -> None:
    """Straight on for three, then round and round: the mean of the rounds is its centre."""
    way = [(-2.0, 0.0), (-1.0, 0.0)]
    way += [(0.02 * x, 0.02 * y) for x, y in [(1, 0), (0, 1), (-1, 0), (0, -1), (1, 0)]]
    names = checkpoints(tmp_path, way)
    found = trajectory_of(lora_merge.compare(names))
    assert found is not None and found.wandering == 5
    assert found.settled == 2
    assert found.command == "lora-merge merge ... --schedule last:5"


def test_the_command_shows_the_way_and_its_advice_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    checkpoints(Path("run"), [(-2.0, 0.0), (0.1, 0.0), (-0.1, 0.0), (0.1, 0.05), (0.0, 0.0)])
    assert run(["compare", "run/checkpoint-*"]) == 0
    shown = capsys.readouterr().out
    assert "checkpoint-1000" in shown and "--schedule last:4" in shown
    assert run(["compare", "run/checkpoint-*", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["trajectory"]
    command = found["command"].replace("...", "run/checkpoint-*").split()[1:]
    assert run([*command, "-o", "mean"]) == 0
    assert Path("mean/adapter_model.safetensors").is_file()


def test_others_have_no_way(tmp_path: Path) -> None:
    names = [str(save_adapter(tmp_path / name, seed=i)) for i, name in enumerate(["a", "b", "c1"])]
    assert trajectory_of(lora_merge.compare(names)) is None
    assert in_order(["x-10", "x-9"]) == ["x-9", "x-10"]
