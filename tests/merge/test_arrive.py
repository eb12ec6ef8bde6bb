"""Adapters that arrive one by one: running means of dense deltas, and what may be replaced."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

import lora_merge
from builders import SHAPES, delta, make_adapter, save_adapter
from lora_merge.adapters.adapter import Adapter
from lora_merge.cli.app import run
from lora_merge.errors import LoraMergeError, OutputError
from lora_merge.merge.arrive import SlotsError, read_slots


def dense(adapter: Adapter) -> Tensor:
    return torch.cat([delta(adapter, name).flatten() for name in SHAPES])


def cosine(a: Tensor, b: Tensor) -> float:
    return float(a @ b / a.norm() / b.norm())


def test_slots_are_running_means_of_what_is_most_alike(tmp_path: Path) -> None:
    """The published steps on dense vectors, at a rank that cuts nothing."""
    adapters = [make_adapter(f"new-{i}", r=3, seed=i) for i in (0, 1, 0, 2, 1, 3)]
    report = lora_merge.arrive(adapters, tmp_path / "lib", slots=2, rank=16)
    slots: dict[str, tuple[int, Tensor]] = {}
    for adapter, arrival in zip(adapters, report.arrivals, strict=True):
        new = dense(adapter)
        cosines = {slot: cosine(new, mean) for slot, (_, mean) in slots.items()}
        assert arrival.cosines == pytest.approx(cosines)
        wanted = max(cosines, key=cosines.__getitem__) if len(slots) == 2 else ""
        wanted = wanted or f"slot-{len(slots) + 1}"
        assert arrival.slot == wanted
        count, mean = slots.get(wanted, (0, torch.zeros_like(new)))
        slots[wanted] = (count + 1, (count * mean + new) / (count + 1))
        assert arrival.kept == pytest.approx(cosine(new, slots[wanted][1]))
    # The third is the first again, the fifth the second: they find each other.
    assert [a.slot for a in report.arrivals[:3]] == ["slot-1", "slot-2", "slot-1"]
    for slot, (count, mean) in slots.items():
        found = Adapter.from_pretrained(tmp_path / "lib" / slot)
        torch.testing.assert_close(dense(found), mean, rtol=1e-4, atol=1e-6)
        assert len(read_slots(tmp_path / "lib")[slot]) == count


def test_one_at_a_time_is_all_at_once(tmp_path: Path) -> None:
    folders = [save_adapter(tmp_path / f"a{i}", r=3, seed=i, alpha=3) for i in range(4)]
    lora_merge.arrive(folders, tmp_path / "once", slots=2)
    for folder in folders:
        lora_merge.arrive(folder, tmp_path / "each", slots=2)
    once, each = (
        {p.relative_to(top): p.read_bytes() for p in top.rglob("*.safetensors")}
        for top in (tmp_path / "once", tmp_path / "each")
    )
    assert len(once) == 2 and once == each
    assert read_slots(tmp_path / "once") == read_slots(tmp_path / "each")
    assert (
        max(s.rank for s in Adapter.from_pretrained(tmp_path / "once/slot-1").modules.values()) == 3
    )


def test_a_threshold_joins_while_slots_are_free(tmp_path: Path) -> None:
    alike = [make_adapter("one", seed=1), make_adapter("two", seed=1), make_adapter("odd", seed=5)]
    report = lora_merge.arrive(alike, tmp_path / "lib", slots=3, threshold=0.9)
    assert [a.slot for a in report.arrivals] == ["slot-1", "slot-1", "slot-2"]


def test_a_zero_adapter_is_like_nobody(tmp_path: Path) -> None:
    config = {"name": "zero"}
    zero = make_adapter(**config)
    for name in SHAPES:
        zero.tensors.read(f"base_model.model.{name}.lora_B.weight").zero_()
    report = lora_merge.arrive([make_adapter("one"), zero], tmp_path / "lib", slots=1)
    assert report.arrivals[1].cosines == {"slot-1": 0.0} and report.arrivals[1].kept == 0.0


def test_what_is_refused_changes_nothing(tmp_path: Path) -> None:
    folder = save_adapter(tmp_path / "a", seed=1)
    library = tmp_path / "lib"
    lora_merge.arrive([folder, save_adapter(tmp_path / "b", seed=2)], library, slots=2)
    before = (library / "slots.json").read_bytes()
    with pytest.raises(SlotsError, match="2 slots already"):
        lora_merge.arrive(folder, library, slots=1)
    with pytest.raises(OutputError, match="lies in"):
        lora_merge.arrive(library / "slot-1", library, slots=2)
    with pytest.raises(LoraMergeError, match="do not fit"):
        lora_merge.arrive(
            make_adapter("other", shapes=dict.fromkeys(SHAPES, (8, 8))), library, slots=2
        )
    assert (library / "slots.json").read_bytes() == before
    (library / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"lora-merge did not write notes\.txt"):
        lora_merge.arrive(folder, library, slots=2)
    plain = tmp_path / "merged"
    lora_merge.merge(folder).save_pretrained(plain)
    with pytest.raises(SlotsError, match="no directory of slots"):
        lora_merge.arrive(folder, plain, slots=2)


def test_the_command_takes_them_in_turn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = [str(save_adapter(tmp_path / f"a{i}", seed=i)) for i in range(3)]
    library = str(tmp_path / "lib")
    assert run(["arrive", *names[:2], "--into", library, "--slots", "2"]) == 0
    capsys.readouterr()
    assert run(["arrive", names[2], "--into", library, "--slots", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [a["merged"] for a in found["arrivals"]] == [True]
    assert sorted(len(members) for members in found["slots"].values()) == [1, 2]
    assert run(["arrive", names[2], "--into", names[0], "--slots", "2"]) == 1
    assert "the list of what lora-merge wrote" in capsys.readouterr().err
