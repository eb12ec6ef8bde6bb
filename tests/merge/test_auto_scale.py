"""`scale: auto`: the rule's laws, where it keeps out, and that a recipe has the number it was."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

import lora_merge
from builders import make_adapter, save_adapter
from lora_merge.adapters.adapter import Adapter
from lora_merge.adapters.alignment import align, read_stacks
from lora_merge.cli.app import run
from lora_merge.merge.auto.scale import Lengths, rule
from lora_merge.merge.methods.registry import METHODS

EXACT = [m.name for m in METHODS.values() if m.exact and not m.needs]


def norm(adapter: Adapter) -> float:
    alignment = align([adapter])
    squares = [
        next(read_stacks(alignment, m)).delta().double().square().sum() for m in alignment.modules
    ]
    return float(torch.stack(squares).sum().sqrt())


def scale_of(merged: Adapter) -> float:
    return yaml.safe_load(merged.texts["lora_merge.yaml"]).get("scale", 1.0)


def some(count: int) -> list[Adapter]:
    return [make_adapter(f"adapter-{i}", r=4, seed=i) for i in range(count)]


@given(
    count=st.integers(2, 8),
    cosine=st.floats(0, 1),
    shrink=st.floats(0.2, 1.5),
    separates=st.booleans(),
)
def test_the_rule_on_adapters_of_one_length_and_one_cosine(
    count, cosine, shrink, separates
) -> None:
    total = count * (1 + (count - 1) * cosine)
    apart = count**2 / total
    found = Lengths(one=1.0, all=total, merged=total * shrink**2, apart=apart)
    scale = rule(found, separates)
    # Copies of one adapter become that adapter, unrelated ones a little more than one of them.
    result = scale * total**0.5 * shrink
    assert result <= 1.45 + 1e-9 and result >= min(1.0, total**0.5) - 1e-9
    if cosine == 1:
        assert result == pytest.approx(1)
    # What a method shrinks is given back.
    whole = Lengths(one=1.0, all=total, merged=total, apart=apart)
    assert scale * shrink == pytest.approx(rule(whole, separates))


def test_a_sum_is_never_made_longer_than_it_is() -> None:
    cancelling = Lengths(one=1.0, all=0.1, merged=0.1, apart=2.0)
    assert rule(cancelling, separates=True) == 1


def test_a_merge_of_unrelated_adapters_is_about_as_long_as_one_of_them() -> None:
    adapters = some(4)
    one = (sum(norm(a) ** 2 for a in adapters) / 4) ** 0.5
    for method, low, high in (("svd", 0.9, 1.2), ("wudi-iso", 1.1, 1.5), ("ties", 1.1, 1.5)):
        merged = lora_merge.merge(adapters, method=method, rank=8)
        assert low < norm(merged) / one < high
        assert any(f"{scale_of(merged):g}" in merged.report.scale_reason for _ in "x")
        assert merged.report.scale == scale_of(merged) != 1


def test_copies_of_one_adapter_stay_that_adapter() -> None:
    adapter = make_adapter("a", r=4, seed=0)
    merged = lora_merge.merge([adapter] * 3, method="svd", rank=4)
    assert norm(merged) == pytest.approx(norm(adapter), rel=0.01)


@pytest.mark.parametrize("method", EXACT)
def test_methods_with_a_law_keep_it(method) -> None:
    adapters = some(2)
    merged = lora_merge.merge(adapters, method=method)
    assert scale_of(merged) == 1 and "exactly" in merged.report.scale_reason


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ({"weights": [1, 0.5]}, "weights"),
        ({"normalize": "sum"}, "shares"),
        ({"restore_norm": "mean"}, "norm"),
    ],
)
def test_what_was_asked_for_is_left_alone(arguments, why) -> None:
    merged = lora_merge.merge(some(2), method="svd", **arguments)
    assert scale_of(merged) == 1 and why in merged.report.scale_reason
    same = lora_merge.merge(some(2), method="svd", scale=1, **arguments)
    assert norm(merged) == norm(same)


def test_the_recipe_has_the_number_and_gives_the_same_bytes(tmp_path: Path, capsys) -> None:
    folders = [str(save_adapter(tmp_path / n, seed=i)) for i, n in enumerate("abc")]
    out, again, plain = (str(tmp_path / n) for n in ("out", "again", "plain"))
    assert run(["merge", *folders, "-M", "svd", "--rank", "4", "-o", out, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    recipe = yaml.safe_load(Path(out, "lora_merge.yaml").read_text())
    assert recipe["scale"] == report["scale"] != 1 and report["scale_reason"]
    assert run(["run", f"{out}/lora_merge.yaml", "-o", again]) == 0
    for name in ("lora_merge.yaml", "adapter_model.safetensors"):
        assert Path(out, name).read_bytes() == Path(again, name).read_bytes()
    # Recipes that say nothing of a scale mean 1, as they always did.
    del recipe["scale"]
    Path(tmp_path, "old.yaml").write_text(yaml.safe_dump(recipe))
    assert run(["run", f"{tmp_path}/old.yaml", "-o", plain]) == 0
    longer = norm(Adapter.from_pretrained(plain)) / norm(Adapter.from_pretrained(out))
    assert longer == pytest.approx(1 / recipe_scale(out), rel=1e-3)


def recipe_scale(out: str) -> float:
    return float(yaml.safe_load(Path(out, "lora_merge.yaml").read_text())["scale"])


def test_adapters_that_never_meet_are_left_alone(tmp_path: Path) -> None:
    adapters = some(2)
    merged = lora_merge.merge(
        adapters,
        method="svd",
        weights=[[{"filter": "q_proj", "value": 1.0}], [{"filter": "up_proj", "value": 1.0}]],
    )
    assert scale_of(merged) == 1 and "no two adapters meet" in merged.report.scale_reason
