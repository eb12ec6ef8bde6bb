"""Neighbours against the table of all pairs."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

import lora_merge
from builders import adapter_parts, make_adapter, save_adapter
from lora_merge.adapters.adapter import Adapter, build_adapter
from lora_merge.adapters.config import parse_config
from lora_merge.analysis.neighbours.sketches import nearest, sketch
from lora_merge.cli.app import cli
from lora_merge.errors import MethodError
from lora_merge.files.tensor_file import TensorDict


def relatives(count: int, families: int, *, own: float, **parts: Any) -> list[Adapter]:
    """Adapters in families: the factors of a parent, and `own` times some of their own."""
    made = []
    for index in range(count):
        config, parent = adapter_parts(seed=1000 + index % families, **parts)
        _, child = adapter_parts(seed=index, **parts)
        tensors = {name: parent[name] + own * child[name] for name in parent}
        made.append(build_adapter(f"a{index}", parse_config(config, "a"), TensorDict(tensors)))
    return made


def cosines_of(adapters: list[Adapter]) -> torch.Tensor:
    """All cosines, from dense deltas."""
    deltas = torch.stack(
        [
            torch.cat([a.stacks(m)[0].delta().double().flatten() for m in a.modules])
            for a in adapters
        ]
    )
    unit = deltas / deltas.norm(dim=1, keepdim=True)
    return unit @ unit.mT


@settings(max_examples=15)
@given(seed=st.integers(0, 50), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_sketches_have_the_inner_products_of_the_deltas(seed, dtype):
    adapters = [make_adapter(f"a{i}", seed=seed + i, dtype=dtype) for i in range(3)]
    (module, *_) = adapters[0].modules
    stack = lora_merge.RankStack.joined(
        [
            lora_merge.RankStack(s.down, s.up, s.scale, torch.full_like(s.owner, i))
            for i, a in enumerate(adapters)
            for s in a.stacks(module)
        ]
    )
    exact = stack.adapter_products()
    found = torch.zeros(3, 3, dtype=torch.float64)
    for turn in range(24):
        numbers = sketch(stack, f"{module} {turn}", 3).double()
        found += numbers @ numbers.mT / 24
    size = exact.diagonal().sqrt()
    assert float(((found - exact) / size / size[:, None]).abs().max()) < 0.25


def test_the_largest_of_each_row_in_order_and_never_itself():
    unit = torch.eye(5, 8)
    unit[1, 0], unit[2, 0], unit[3, 0] = 0.9, -0.95, 0.9
    found = nearest(unit, unit.norm(dim=1).double(), 4)
    assert found.indices[0].tolist() == [2, 1, 3, 4]  # -0.69, 0.67, 0.67, 0
    assert all(i not in row for i, row in enumerate(found.indices.tolist()))


def test_cosines_are_those_of_all_pairs_and_families_come_back():
    adapters = relatives(30, 5, own=0.4)
    found = lora_merge.neighbours(adapters, count=3)
    exact = cosines_of(adapters)
    for i, near in enumerate(found.neighbours):
        assert len(near) == 3
        for j, cosine in near:
            assert cosine == pytest.approx(float(exact[i, j]), abs=1e-5)
            assert found.families[i] == found.families[j] == i % 5
    assert found.duplicates == ()
    assert 0 < found.error < 0.2 and 0 < found.missed < 1


def test_of_few_adapters_every_pair_is_measured():
    adapters = relatives(9, 3, own=0.5)
    found, whole = lora_merge.neighbours(adapters, count=8), lora_merge.compare(adapters)
    assert found.missed == 0
    for i, near in enumerate(found.neighbours):
        ranked = sorted(range(9), key=lambda j: -abs(float(whole.total.cosine[i, j])))
        assert [j for j, _ in near] == [j for j in ranked if j != i]


def test_near_duplicates_are_found_whatever_they_are_called_or_scaled():
    config, tensors = adapter_parts(seed=3)
    twice = {name: t * (2.0 if "lora_A" in name else 0.5) for name, t in tensors.items()}
    louder = {name: t * 3.0 for name, t in tensors.items()}
    twins = [
        build_adapter(f"t{i}", parse_config(config, "t"), TensorDict(t))
        for i, t in enumerate((tensors, twice, louder))
    ]
    found = lora_merge.neighbours([*relatives(20, 20, own=1.0), *twins], count=2)
    assert found.duplicates == ((20, 21, 22),)
    assert found.neighbours[20][0][1] == pytest.approx(1.0, abs=1e-6)


def test_jobs_and_order_change_nothing():
    adapters = relatives(14, 3, own=0.5, r=3)
    one, other = (lora_merge.neighbours(adapters, count=2, jobs=jobs) for jobs in (1, 3))
    assert one.to_dict() == other.to_dict()
    turned = lora_merge.neighbours(adapters[::-1], count=2)
    for i, near in enumerate(one.neighbours):
        back = {13 - j: c for j, c in turned.neighbours[13 - i]}
        assert back == pytest.approx(dict(near), abs=1e-6)


def test_adapters_without_a_module_or_without_anything_have_their_place():
    few = {"model.layers.0.mlp.up_proj": (40, 16)}
    adapters = [*relatives(4, 1, own=0.3), make_adapter("few", seed=9, shapes=few)]
    config, tensors = adapter_parts(seed=4)
    nothing = TensorDict({name: torch.zeros_like(t) for name, t in tensors.items()})
    adapters.append(build_adapter("zero", parse_config(config, "zero"), nothing))
    found = lora_merge.neighbours(adapters, count=5)
    exact = cosines_of(adapters[:4])
    assert dict(found.neighbours[0])[1] == pytest.approx(float(exact[0, 1]), abs=1e-5)
    assert all(cosine == 0 for _, cosine in found.neighbours[5])


def test_too_many_neighbours_are_refused():
    with pytest.raises(MethodError, match="3 neighbours of 3 adapters") as error:
        lora_merge.neighbours(relatives(3, 1, own=0.5), count=3)
    assert error.value.remedy == "give 1 to 2"


@pytest.fixture
def pool(tmp_path: Path) -> str:
    for index in range(30):
        save_adapter(tmp_path / "pool" / f"a{index}", seed=index % 28)  # two of them twice
    return str(tmp_path / "pool" / "*")


def run(*words: str) -> Any:
    result = CliRunner().invoke(cli, ["compare", *words], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_the_command_shows_families_and_duplicates(pool: str) -> None:
    text = run(pool, "--neighbours", "2", "--width", "80")
    assert "near-duplicates" in text and "2: a0 a28" in text
    assert max(map(len, text.splitlines())) <= 80
    document = json.loads(run(pool, "--neighbours", "2", "--json"))
    assert [len(near) for near in document["neighbours"]] == [2] * 30
    plan = json.loads(run(pool, "--neighbours", "2", "--dry-run", "--json"))
    assert plan["pairs"] == 435 and plan["peak_bytes"] > 0


def test_what_needs_all_pairs_is_refused_beside_it(pool: str) -> None:
    result = CliRunner().invoke(cli, ["compare", pool, "--neighbours", "2", "--cluster", "auto"])
    assert result.exit_code == 2 and "leave out --cluster" in result.output
