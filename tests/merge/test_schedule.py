"""Weights over the checkpoints of one run."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from builders import save_adapter
from lora_merge.adapters.references import in_order
from lora_merge.cli.app import run
from lora_merge.errors import MethodError
from lora_merge.merge.auto.schedule import schedule_weights

SCHEDULES = ["uniform", "linear", "last:2", "ema:0.95", "ema:0", "power:0.2", "power:0.05"]


@given(schedule=st.sampled_from(SCHEDULES), count=st.integers(1, 40))
def test_weights_are_shares_and_never_fall(schedule: str, count: int) -> None:
    weights = schedule_weights(schedule, count)
    assert len(weights) == count and sum(weights) == pytest.approx(1)
    assert min(weights) >= 0
    if not schedule.startswith("ema"):  # the first value of an average counts for all before it
        assert all(a <= b + 1e-12 for a, b in pairwise(weights))


@given(beta=st.floats(0, 0.999), values=st.lists(st.floats(-9, 9), min_size=1, max_size=20))
def test_ema_is_what_the_running_average_would_hold(beta: float, values: list[float]) -> None:
    average = values[0]
    for value in values[1:]:
        average = beta * average + (1 - beta) * value
    weights = schedule_weights(f"ema:{beta!r}", len(values))
    assert float(np.dot(weights, values)) == pytest.approx(average, abs=1e-9)


@pytest.mark.parametrize("sigma", [0.05, 0.1, 0.2, 0.28])
def test_power_has_the_relative_width_asked_for(sigma: float) -> None:
    weights = np.array(schedule_weights(f"power:{sigma}", 20_000))
    times = np.arange(1, 20_001) / 20_000
    mean = float(weights @ times)
    assert float(weights @ (times - mean) ** 2) ** 0.5 == pytest.approx(sigma, rel=0.01)


@pytest.mark.parametrize(
    "text", ["ema", "ema:1", "ema:x", "last:0", "power:0.5", "lineal", "linear:3"]
)
def test_what_is_no_schedule_is_refused(text: str) -> None:
    with pytest.raises(MethodError, match="no schedule") as error:
        schedule_weights(text, 3)
    assert "ema:BETA" in str(error.value.remedy)


def test_checkpoints_are_ordered_by_their_numbers_not_by_letters() -> None:
    names = ["run/checkpoint-1000", "run/checkpoint-500", "run/checkpoint-1500"]
    assert in_order(names) == [names[1], names[0], names[2]]
    assert in_order(["b", "a"]) == ["b", "a"]


def test_a_schedule_is_the_mean_with_its_weights(tmp_path: Path) -> None:
    for step, seed in ((500, 0), (1000, 1), (1500, 2)):
        save_adapter(tmp_path / f"checkpoint-{step}", seed=seed)
    out, same = str(tmp_path / "out"), str(tmp_path / "same")
    command = ["merge", f"{tmp_path}/checkpoint-*", "--schedule", "linear", "-o", out]
    assert run(command) == 0
    recipe = yaml.safe_load(Path(out, "lora_merge.yaml").read_text())
    assert recipe["merge_method"] == "mean"
    weights = {Path(i["adapter"]).name: i["weight"] for i in recipe["adapters"]}
    assert weights["checkpoint-1500"] == pytest.approx(0.5)
    assert weights["checkpoint-500"] == pytest.approx(1 / 6)
    by_hand = [str(tmp_path / f"checkpoint-{s}") for s in (500, 1000, 1500)]
    flags = [w for weight in ("1", "2", "3") for w in ("-w", weight)]
    assert run(["merge", *by_hand, "-M", "mean", *flags, "-o", same]) == 0
    from safetensors.torch import load_file

    first, second = (load_file(f"{o}/adapter_model.safetensors") for o in (out, same))
    assert all(
        np.allclose(first[k] @ first[k].T, second[k] @ second[k].T, atol=1e-6) for k in first
    )
    assert run([*command[:-1], "x", "-w", "1"]) == 2
