"""Which implementation is chosen, and what happens when a kernel fails."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kernels.stacks import make_stack
from lora_merge.errors import LoraMergeWarning, MethodError
from lora_merge.kernels.gated_stack import dispatch, operation
from lora_merge.kernels.gated_stack.dispatch import Case, choose, guarded, table_path

CASE = Case("cpu", 4096, 6144, 224, 1, "float32", "top-k", 28, 2)
ABLE = ("eager", "reference", "triton")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(dispatch.VARIABLE, raising=False)
    dispatch.forget()
    yield tmp_path
    dispatch.forget()


def write(
    rows: dict[str, str], versions: dict[str, str] | None = None, device: str = "cpu"
) -> None:
    path = table_path(device)
    path.parent.mkdir(parents=True, exist_ok=True)
    table = {
        key: {"seconds": {name: 1.0 + (name != best) for name in ("concat", "eager", "triton")}}
        for key, best in rows.items()
    }
    path.write_text(json.dumps({"versions": versions or dispatch.versions(), "rows": table}))


def test_a_key_rounds_sizes_up() -> None:
    assert CASE.key == "4096x8192 R256 E32 T1 float32 top-2"
    near = Case("cpu", 4000, 8192, 129, 1, "float32", "top-k", 17, 2)
    assert near.key == CASE.key
    others = [replace(CASE, **change) for change in ({"tokens": 2}, {"experts": 8}, {"kept": 1})]
    assert len({CASE.key, *(other.key for other in others)}) == 4


def test_without_a_measurement_the_first_that_can_runs() -> None:
    assert choose(CASE, ABLE) == "eager"
    assert choose(CASE, ("concat", "eager")) == "concat"


def test_the_table_decides_among_those_that_can() -> None:
    write({CASE.key: "triton"})
    assert choose(CASE, ABLE) == "triton"
    assert choose(CASE, ("eager", "reference")) == "eager"


@pytest.mark.parametrize("name", ["reference", "eager", "triton"])
def test_the_variable_overrules_the_table(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    write({CASE.key: "eager"})
    monkeypatch.setenv(dispatch.VARIABLE, name)
    assert choose(CASE, ABLE) == name
    assert choose(CASE, ("eager",)) == "eager"


def test_a_wrong_variable_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(dispatch.VARIABLE, "fastest")
    with pytest.raises(MethodError, match="LORA_MERGE_KERNELS is 'fastest'"):
        choose(CASE, ABLE)


@pytest.mark.parametrize("text", ["", "[]", '{"rows": 3}', '{"rows": {"a": {}}}', "\0"])
def test_a_damaged_table_is_named_and_ignored(text: str) -> None:
    write({})
    table_path("cpu").write_text(text)
    with pytest.warns(LoraMergeWarning, match=r"cpu-triton-.*\.json is damaged"):
        assert choose(CASE, ABLE) == "eager"
    assert choose(CASE, ABLE) == "eager"  # no second warning


def test_a_table_of_other_versions_is_ignored() -> None:
    write({CASE.key: "triton"}, {"torch": "1.0", "triton": "1.0"})
    with pytest.warns(LoraMergeWarning, match="lora-merge tune"):
        assert choose(CASE, ABLE) == "eager"


def test_each_triton_has_its_own_table(monkeypatch: pytest.MonkeyPatch) -> None:
    write({CASE.key: "triton"})
    here = table_path("cpu")
    versions = {**dispatch.versions(), "triton": "99.0+x y"}
    monkeypatch.setattr(dispatch, "versions", lambda: versions)
    assert table_path("cpu") != here and table_path("cpu").name == "cpu-triton-99.0-x-y.json"
    assert choose(CASE, ABLE) == "eager"  # nobody measured with it, and nothing is wrong


DECODED = Case("nvidia-h200", 4096, 28672, 448, 1, "bfloat16", "dense", 28)


@pytest.mark.parametrize("card", ["nvidia-h200", "nvidia-h100-80gb-hbm3"])
def test_what_was_measured_on_such_a_card_comes_along(card: str) -> None:
    every = ("eager", "triton", "joined", "grouped")
    case = replace(DECODED, device=card)
    assert choose(case, ("concat", "joined")) == "joined"
    prompt = replace(case, d_out=6144, units=3072, tokens=4096, gate="top-k", experts=64, kept=2)
    assert choose(prompt, every) == "grouped"
    assert choose(replace(case, tokens=64), every) == "eager"  # nobody measured it
    assert choose(replace(case, device="nvidia-a100-sxm4-80gb"), every) == "eager"
    write({case.key: "eager"}, device=card)  # what was measured here goes before it
    dispatch.forget()
    assert choose(case, every) == "eager"
    assert choose(prompt, every) == "grouped"


def test_the_table_that_comes_along_is_made_of_the_results(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    import shipped_table

    assert json.loads(shipped_table.TARGET.read_text()) == shipped_table.made()


def test_a_failing_kernel_is_named_once() -> None:
    def fast() -> str:
        raise RuntimeError("no shared memory")

    with pytest.warns(
        LoraMergeWarning, match=r"the kernel shrink failed \(RuntimeError: no shared"
    ):
        assert guarded("shrink", fast, lambda: "plain") == "plain"
    assert guarded("shrink", fast, lambda: "plain") == "plain"
    assert guarded("expand", lambda: "fast", lambda: "plain") == "fast"


@pytest.mark.parametrize("error", [MethodError("shapes"), torch.OutOfMemoryError("full")])
def test_what_is_not_the_kernels_fault_goes_through(error: Exception) -> None:
    def fast() -> str:
        raise error

    with pytest.raises(type(error)):
        guarded("shrink", fast, lambda: "plain")


def test_calls_ask_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Case] = []

    def record(case: Case, able: object) -> str:
        asked.append(case)
        return "reference"

    monkeypatch.setattr(operation.dispatch, "choose", record)
    stack = make_stack(3, [2, 2])
    operation.routed_shrink(stack.x, stack.down, stack.gate, stack.layout, stack.rule)
    assert asked[0] == Case("cpu", 40, 0, 4, 3, "float32", "dense", 2)
