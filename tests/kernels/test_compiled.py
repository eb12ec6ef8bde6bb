"""The Triton kernels compiled for GPUs nobody has here; `triton_suite` runs them."""

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_merge.kernels.gate_rule import Rule
from lora_merge.kernels.gated_stack.layout import Layout

pytestmark = pytest.mark.skipif(
    find_spec("triton") is None or bool(os.environ.get("TRITON_INTERPRET")),
    reason="triton is not installed, or interprets",
)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def compiled(found: list[Any]) -> list[Any]:
    from lora_merge.kernels.gated_stack.gpu.compile_check import compile_all

    done = list(compile_all(found, 90))
    assert done and not [one for one in done if one.error]
    return done


def test_every_kernel_tile_gate_and_dtype_occurs_in_the_sample() -> None:
    from lora_merge.kernels.gated_stack.gpu.recorded_launches import launches, sample

    for capability in (80, 90):
        every = launches(capability)
        few = sample(every)
        assert set().union(*(one.features for one in few)) == set().union(
            *(one.features for one in every)
        )
        assert len(few) < 60 < len(every)
        names = {one.name for one in few}
        assert {"shrink", "score", "gate", "expand", "gate and expand: gate_expand"} <= names
        assert {f"grouped: {step}" for step in ("route", "place", "shrink", "expand")} <= names


@pytest.mark.timeout(600)
def test_the_sample_compiles_without_much_spilling() -> None:
    from lora_merge.kernels.gated_stack.gpu.compile_check import chosen, compile_all

    for one in compile_all(chosen(90), 90):
        assert not one.error and one.spilled <= 64, one


def test_what_does_not_compile_is_a_result() -> None:
    from dataclasses import replace

    from lora_merge.kernels.gated_stack.gpu.compile_check import compile_all
    from lora_merge.kernels.gated_stack.gpu.recorded_launches import launches

    first = next(one for one in launches(90) if one.name == "expand")
    wrong = replace(first, constants={**first.constants, "BM": 3})
    (one,) = compile_all([wrong], 90)
    assert one.kernel == "expand" and one.error and "\n" not in one.error


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("rule", [Rule(), Rule(top_k=2)], ids=["dense", "top-2"])
def test_all_programs_of_a_decoding_launch_fit_at_once(rule: Rule, early: bool) -> None:
    """28 experts of rank 8 on Llama-3-8B's gate_proj and up_proj, as `joined` runs them.

    Four programs of 8 warps share a processor if each thread has at most 64 registers, and each has
    asked for all its 32 kB of `up` before it waits, unless the gate has to say which it wants; 448
    programs then fit on 132 processors.
    """
    from lora_merge.kernels.gated_stack.gpu import _launch
    from lora_merge.kernels.gated_stack.gpu.recorded_launches import recording

    widths, columns = (14336, 14336), empty(224, dtype=torch.int64)
    tiles = _launch.gate_expand_tiles(1, sum(widths))
    with recording() as found:
        _launch.gate_expand(
            empty(1, sum(widths)), empty(1, 1, 448), empty(3, 1, 56),
            empty(224 * sum(widths), dtype=torch.bfloat16), widths, columns, tiles, torch.bfloat16,
            rule=rule, early=early,
        )  # fmt: skip
    (one,) = compiled(found)
    assert one.ahead == (0 if rule.top_k else 8)  # of 16 bytes, by each of 256 threads
    assert one.registers <= 64 and not one.spilled
    programs, threads = sum(widths) // tiles.n, 32 * tiles.warps
    assert programs <= 132 * (65536 // (threads * 64))


def test_where_most_rows_are_used_the_first_are_asked_for_before_the_gate_is_known() -> None:
    """16 tokens that keep 2 of 28 experts use two thirds of the rows, of 64 experts fewer."""
    from lora_merge.kernels.gated_stack.gpu import _launch
    from lora_merge.kernels.gated_stack.gpu.recorded_launches import recording

    half, width = torch.bfloat16, 14336
    with recording() as found:
        for experts in (28, 64):
            _launch.gate_expand(
                empty(16, width), empty(1, 16, 8 * experts), empty(3, 16, experts),
                empty(8 * experts * width, dtype=half), (width,),
                empty(8 * experts, dtype=torch.int64), _launch.gate_expand_tiles(16, width), half,
                rule=Rule(top_k=2),
            )  # fmt: skip
    most, few = compiled(found)
    assert "SKIP=False" in most.setting and "SKIP=True" in few.setting
    assert most.ahead == 4  # of 16 bytes, by each of 256 threads: 16 kB a program
    assert not most.spilled and not few.spilled


def test_the_expand_of_a_prompt_has_loads_in_flight() -> None:
    from lora_merge.kernels.gated_stack.gpu import _launch
    from lora_merge.kernels.gated_stack.gpu.recorded_launches import recording

    half = torch.bfloat16
    with recording() as found:
        for tokens in (16, 128, 4096):
            y, z = empty(tokens, 14336, dtype=half), empty(tokens, 224, dtype=half)
            tiles = _launch.expand_tiles(tokens, 14336)
            _launch.expand(y, z, empty(224, 14336, dtype=half), None, tiles)
    for one in compiled(found):
        assert one.asynchronous and one.spilled <= 16


@pytest.mark.parametrize("rank", [16, 128])
def test_grouped_kernels_have_loads_in_flight(rank: int) -> None:
    """64 experts, 4096 tokens; copies of 16 bytes for a tile of `up` and of y, in each stage."""
    from lora_merge.kernels.gated_stack.gpu import _launch, _launch_grouped, grouped
    from lora_merge.kernels.gated_stack.gpu.recorded_launches import recording

    half, tokens, count = torch.bfloat16, 4096, 64
    layout = Layout(empty(count * rank, dtype=torch.int64), count, rank, 1, 14336)
    rule = Rule(top_k=2, absolute=True)
    segments = torch.empty(count, 2, dtype=torch.int32, device="meta")
    with recording() as found:
        x = empty(tokens, 4096, dtype=half)
        parts = _launch.score(x, empty(count, 4096))
        tile = _launch_grouped.tile_of(layout, rule)
        experts, weights, counts = _launch_grouped.route(parts, layout, rule, None, tile)
        order, blocks = _launch_grouped.place(experts, counts, tile)
        down = empty(count * rank, 4096, dtype=half)
        z = _launch_grouped.shrink(x, down, weights, segments, order, blocks, rank)
        places = grouped.Places(order[0], blocks[0], weights[0], segments, count * rank)
        up = empty(count * rank, 14336, dtype=half)
        _launch_grouped.expand(empty(tokens, 14336, dtype=half), z[0], up, places)
    done = {one.kernel: one for one in compiled([*{one.key: one for one in found}.values()])}
    assert all(one.spilled <= 16 for one in done.values())
    assert done["grouped: shrink"].asynchronous
    score = done["score"]
    assert score.asynchronous
    assert 2 * score.shared <= 227 * 1024 and 2 * 256 * score.registers <= 65536
    columns = _launch_grouped._columns(rank * 2)
    assert done["grouped: expand"].asynchronous >= 3 * (rank + 32) * columns * 2 // (128 * 16)


@pytest.mark.parametrize("broken", [False, True])
def test_the_command_says_what_compiles(
    broken: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import json
    from dataclasses import replace

    from lora_merge.cli.app import run
    from lora_merge.kernels.gated_stack.gpu import compile_check

    first = next(one for one in compile_check.launches(90) if one.name == "expand")
    if broken:
        first = replace(first, constants={**first.constants, "BM": 3})
    monkeypatch.setattr(compile_check, "chosen", lambda _: [first])
    monkeypatch.setattr(compile_check, "targets", lambda _: (80, 90))
    assert run(["tune", "--check", "--device", "cpu", "--json"]) == int(broken)
    shown = capsys.readouterr()
    result = json.loads(shown.out)
    assert result["capabilities"] == [80, 90]
    assert (result["compiled"], len(result["failed"])) == ((0, 2) if broken else (2, 0))
    assert ("2 of 2 launches do not compile" in shown.err) == broken
