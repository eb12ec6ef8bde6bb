"""Measuring implementations and keeping the table, on the CPU with small shapes."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from builders import save_adapter
from lora_merge.cli.app import run
from lora_merge.errors import MethodError, OutputError
from lora_merge.kernels.gated_stack import dispatch, tune_cases
from lora_merge.kernels.gated_stack import tune as tuning
from lora_merge.kernels.gated_stack.tune import store, tune
from lora_merge.kernels.gated_stack.tune_cases import StackShape
from lora_merge.machine.timing import Timing, measure
from lora_merge.mixture.mixture import Mixture
from lora_merge.mixture.runtime.fit_to_model import stack_shapes

SMALL = StackShape(24, (16, 8), (2, 3, 4))
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(tune_cases, "_COLD", 1 << 12)
    monkeypatch.setattr(tuning, "measure", quick)
    dispatch.forget()
    yield tmp_path / "cache"
    dispatch.forget()


def quick(work, device, **how):
    return measure(work, device, rounds=2, least=0.0)


def test_timings_are_of_one_call() -> None:
    calls = {"a": 0, "b": 0}

    def count(name: str) -> None:
        calls[name] += 1

    timings = measure({n: lambda n=n: count(n) for n in calls}, CPU, rounds=3, least=0.0)
    assert calls["a"] == calls["b"]
    assert all(t.low <= t.median <= t.high and t.rounds == 3 for t in timings.values())
    assert Timing.of([2.0]) == Timing(2.0, 2.0, 2.0, 1)
    assert Timing.of([1.0, 2.0, 3.0, 4.0, 5.0]) == Timing(3.0, 2.0, 4.0, 5)


def test_a_table_that_cannot_be_kept_is_told_before_measuring(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(tuning, "measure", lambda *_, **__: pytest.fail("measured"))
    assert run(["tune", "--device", "cpu", "--experts", "1"]) == 1
    assert "set XDG_CACHE_HOME" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_implementation_is_timed_and_means_the_same(dtype, monkeypatch) -> None:
    """What is timed is what a model would compute: all ways agree."""
    seen: list[dict[str, list[torch.Tensor]]] = []

    def look(work, device, **how):
        ways = {name: call.args[0](0) for name, call in work.items()}
        seen.append(ways)
        return quick(work, device)

    monkeypatch.setattr(tuning, "measure", look)
    rows = list(tune([SMALL], CPU, dtype, tokens=[3, 40]))
    kinds = ("given", "dense", "top-k")
    assert [(row.case.tokens, row.case.gate) for row in rows] == [
        (tokens, kind) for tokens in (3, 40) for kind in kinds
    ]
    for row, ways in zip(rows, seen, strict=True):
        assert set(row.timings) == {"base", "eager", "concat"}
        assert "triton" in row.excluded
        for a, b, base in zip(ways["eager"], ways["concat"], ways["base"], strict=True):
            torch.testing.assert_close(a, b, rtol=0.05, atol=0.05)
            assert (a - base).abs().max() > 0.01


def test_the_table_is_what_dispatch_reads(cache: Path) -> None:
    (first, *rest) = tune([SMALL], CPU, torch.float32, tokens=[2])
    assert dispatch.choose(first.case, ("triton",)) == "triton"
    path = store([first], CPU)
    assert path == dispatch.table_path("cpu") and path.is_relative_to(cache)
    timed = {n: t.median for n, t in first.timings.items() if n != "base"}
    assert dispatch.table("cpu") == {first.case.key: timed}
    assert dispatch.choose(first.case, ("concat", "eager")) == min(timed, key=timed.get)
    store(rest, CPU)  # adds to what is there
    assert len(dispatch.table("cpu")) == 3
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_damaged_table_is_replaced(cache: Path) -> None:
    rows = list(tune([SMALL], CPU, torch.float32, tokens=[2]))
    path = store(rows, CPU)
    path.write_text("{")
    assert store(rows, CPU) == path
    assert len(dispatch.table("cpu")) == 3


def test_what_cannot_be_kept_is_said(cache: Path) -> None:
    cache.mkdir()
    (cache / "lora-merge").write_text("a file")
    with pytest.raises(OutputError, match=r"cannot write|is no directory"):
        store(list(tune([SMALL], CPU, torch.float32, tokens=[1])), CPU)
    with pytest.raises(MethodError, match="float64"):
        list(tune([SMALL], CPU, torch.float64))


@pytest.mark.parametrize("fault", ["raises", "differs"])
def test_kernels_that_are_wrong_here_are_not_chosen(fault: str, monkeypatch) -> None:
    stacked = tune_cases._stacked

    def spoilt(outputs):
        if fault == "raises":
            raise RuntimeError("no such instruction")
        return [y * 1.01 for y in outputs]

    def wrong(x, modules, layout, rule, how):
        outputs = stacked(x, modules, layout, rule, "eager")
        return spoilt(outputs) if how == "triton" else outputs

    def wrong_joined(x, joined, layout, rule):
        return spoilt([x.new_ones(len(x), w.shape[0]) for w in joined.weights])

    monkeypatch.setattr(tune_cases, "_stacked", wrong)
    monkeypatch.setattr(tune_cases, "_joined", wrong_joined)
    monkeypatch.setattr(tuning.fused, "refusal", lambda *_: "")
    row, *_ = tune([SMALL], CPU, torch.float32, tokens=[2])
    reason = {"raises": "no such instruction", "differs": "not those of eager"}[fault]
    for name in ("triton", "joined"):
        assert reason in row.excluded[name]
        assert name not in row.timings


def test_shapes_of_a_mixture(tmp_path: Path) -> None:
    shapes = {
        f"model.layers.{layer}.self_attn.{name}_proj": (width, 12)
        for layer in range(2)
        for name, width in (("q", 8), ("k", 4), ("v", 4), ("o", 12))
    }
    paths = [
        str(save_adapter(tmp_path / f"expert{r}", r=r, alpha=r, seed=r, shapes=shapes))
        for r in (2, 3)
    ]
    mixture = Mixture(paths)
    assert set(stack_shapes(mixture)) == {
        StackShape(12, (8, 4, 4), (2, 3)), StackShape(12, (12,), (2, 3)),
    }  # fmt: skip
    mixture.save_pretrained(tmp_path / "mix")
    assert run(["tune", str(tmp_path / "mix"), "--device", "cpu", "--tokens", "1"]) == 0
    assert len(dispatch.table("cpu")) == 4  # two experts have no top 2
    assert run(["tune", str(tmp_path / "mix"), "--rank", "3"]) == 2  # its own shapes count


def test_the_command_says_that_there_is_no_gpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], cache: Path
) -> None:
    monkeypatch.setattr(tune_cases, "llama_shapes", lambda *_: [SMALL])
    assert run(["tune", "--device", "cpu", "--tokens", "2", "--dry-run"]) == 0
    shown = capsys.readouterr()
    assert "no GPU" in shown.err and "24x24 R18 T2 top-k" in shown.out
    assert not cache.exists()
    assert run(["tune", "--device", "cpu", "--graph"]) == 2
    assert "no GPU" in capsys.readouterr().err
    assert max(map(len, shown.out.splitlines())) <= 80
    assert run(["tune", "--device", "cpu", "--tokens", "2", "--json"]) == 0
    shown = capsys.readouterr()
    result = json.loads(shown.out)
    assert not shown.err and not result["gpu"] and result["device"] == "cpu"
    assert Path(result["table"]).exists()
    assert {row["fastest"] for row in result["rows"]} <= {"eager", "concat"}
    assert "no kernel" in result["rows"][0]["excluded"]["triton"]
