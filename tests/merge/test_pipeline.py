"""From adapters to a directory: determinism, policies, reports and refusals."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from builders import adapter_parts, make_adapter, save_adapter, save_parts
from lora_merge.adapters.adapter import Adapter
from lora_merge.adapters.alignment import align, read_stacks
from lora_merge.errors import AdapterError, AlignmentError, LoraMergeError, MethodError
from lora_merge.merge.api import run_recipe
from lora_merge.merge.plan import MergePlan, plan_merge
from lora_merge.merge.recipe.read import RecipeError, parse_recipe, read_recipe
from lora_merge.merge.recipe.recipe import AdapterItem, Recipe
from lora_merge.merge.report import GroupReport, MergeReport, ModuleReport

SUM = {"reweight_output": "sum"}


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """Three adapters of different rank, scaling, dtype and modules."""
    few = {"model.layers.0.self_attn.q_proj": (24, 16)}
    return [
        save_adapter(tmp_path / "a", r=4, seed=1),
        save_adapter(tmp_path / "b", r=2, seed=2, use_rslora=True, dtype=torch.bfloat16),
        save_adapter(tmp_path / "c", r=3, seed=3, shapes=few),
    ]


def recipe_of(folders: list[Path], rank: int = 3, **fields: Any) -> Recipe:
    items = tuple(AdapterItem(str(f)) for f in folders)
    return Recipe("lego", items, rank, **fields)


def make(recipe: Recipe, out: Path, **options: Any) -> dict[str, bytes]:
    """Run a recipe; the written files by name."""
    run_recipe(recipe, out, **options)
    return {p.name: p.read_bytes() for p in out.iterdir()}


def deltas(folder: Path) -> dict[str, torch.Tensor]:
    alignment = align([Adapter.from_pretrained(folder)])
    return {m.name: next(read_stacks(alignment, m)).delta() for m in alignment.modules}


def test_the_same_bytes_for_any_order_jobs_and_rerun(folders: list[Path], tmp_path: Path) -> None:
    first = make(recipe_of(folders), tmp_path / "first", jobs=1)
    assert set(first) == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "README.md",
        "lora_merge.yaml",
        ".lora_merge_files.json",
    }
    for number, order in enumerate(itertools.permutations(folders)):
        for jobs in (1, 2, 5):
            out = tmp_path / f"out-{number}-{jobs}"
            assert make(recipe_of(list(order)), out, jobs=jobs) == first
    again = read_recipe(tmp_path / "first" / "lora_merge.yaml")
    assert make(again, tmp_path / "again") == first
    assert make(recipe_of(folders, seed=1), tmp_path / "seed") != first


def test_a_module_is_merged_the_same_whatever_else_is_there(tmp_path: Path) -> None:
    """One module alone gives what it gives among others."""
    name = "model.layers.0.self_attn.q_proj"
    parts = [adapter_parts(seed=s) for s in (1, 2)]
    alone = [
        save_parts(tmp_path / f"one{i}", c, {k: v for k, v in t.items() if name in k})
        for i, (c, t) in enumerate(parts)
    ]
    whole = [save_parts(tmp_path / f"all{i}", c, t) for i, (c, t) in enumerate(parts)]
    make(recipe_of(alone), tmp_path / "x")
    make(recipe_of(whole), tmp_path / "y")
    torch.testing.assert_close(deltas(tmp_path / "x")[name], deltas(tmp_path / "y")[name])


def test_inputs_are_never_modified(folders: list[Path], tmp_path: Path) -> None:
    before = {p: p.read_bytes() for f in folders for p in f.iterdir()}
    make(recipe_of(folders), tmp_path / "out")
    assert {p: p.read_bytes() for f in folders for p in f.iterdir()} == before


def test_weight_zero_is_the_same_as_absent(folders: list[Path], tmp_path: Path) -> None:
    with_zero = recipe_of(folders)
    items = (*with_zero.adapters[:2], AdapterItem(str(folders[2]), weight=0.0))
    zero = Recipe("lego", items, 3)
    first = make(zero, tmp_path / "zero")
    assert first == make(recipe_of(folders[:2]), tmp_path / "absent")


def test_opposite_weights_cancel(folders: list[Path], tmp_path: Path) -> None:
    items = (AdapterItem(str(folders[0]), 1.0), AdapterItem(str(folders[0]), -1.0))
    make(Recipe("lego", items, 8, parameters=SUM), tmp_path / "out")
    for delta in deltas(tmp_path / "out").values():
        assert float(delta.abs().max()) < 1e-6


def test_weights_scale_the_exact_sum(folders: list[Path], tmp_path: Path) -> None:
    items = (AdapterItem(str(folders[0]), 2.0), AdapterItem(str(folders[2]), -0.5))
    make(Recipe("lego", items, 7, parameters=SUM), tmp_path / "out")
    first, second = deltas(folders[0]), deltas(folders[2])
    for name, delta in deltas(tmp_path / "out").items():
        exact = 2 * first[name] - 0.5 * second.get(name, torch.zeros(()))
        torch.testing.assert_close(delta, exact, rtol=1e-4, atol=1e-5)


def test_the_portable_layout_says_scaling_one(folders: list[Path], tmp_path: Path) -> None:
    files = make(recipe_of(folders, rank=5), tmp_path / "out")
    config = json.loads(files["adapter_config.json"])
    assert config["r"] == config["lora_alpha"] == 5
    assert not config["use_rslora"]
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    written = Adapter.from_pretrained(tmp_path / "out")
    assert set(written.ranks()) == {5}
    assert {m.dtype for m in written.modules.values()} == {"F32"}
    wanted = make(recipe_of(folders, dtype="bfloat16"), tmp_path / "half")
    assert len(wanted["adapter_model.safetensors"]) < len(files["adapter_model.safetensors"])


def test_the_card_and_recipe_name_the_sources(folders: list[Path], tmp_path: Path) -> None:
    files = make(recipe_of(folders), tmp_path / "out")
    recipe = yaml.safe_load(files["lora_merge.yaml"])
    assert [item["adapter"] for item in recipe["adapters"]] == sorted(map(str, folders))
    assert all(len(item["sha256"]) == 64 for item in recipe["adapters"])
    card = files["README.md"].decode()
    metadata = yaml.safe_load(card.split("---")[1])
    assert metadata["base_model"] == "tiny-base"
    assert {"lora", "merge", "peft", "lora-merge"} <= set(metadata["tags"])
    assert files["lora_merge.yaml"].decode().split("units:")[0] in card


def test_a_source_that_changed_is_noticed(folders: list[Path], tmp_path: Path) -> None:
    make(recipe_of(folders), tmp_path / "out")
    save_adapter(folders[0], seed=99)
    with pytest.raises(RecipeError, match="not those the recipe was made from"):
        make(read_recipe(tmp_path / "out" / "lora_merge.yaml"), tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_nothing_is_written_when_a_tensor_is_damaged(tmp_path: Path) -> None:
    config, tensors = adapter_parts()
    tensors["base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"][0, 0] = float("nan")
    damaged = save_parts(tmp_path / "damaged", config, tensors)
    with pytest.raises(AdapterError, match=r"layers\.1\.mlp\.up_proj"):
        make(recipe_of([save_adapter(tmp_path / "good"), damaged]), tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["damaged", "good"]


def plan_of(*adapters: Adapter, weights: list[float] | None = None, **options: Any) -> MergePlan:
    options = {"merge_method": "lego", "rank": 3, **options}
    items = tuple(
        AdapterItem(a.name, w) for a, w in zip(adapters, weights or [1.0] * 9, strict=False)
    )
    return plan_merge(Recipe(adapters=items, **options), adapters)


@pytest.mark.parametrize(
    ("options", "message", "remedy"),
    [
        ({"rank": 9}, "the largest module has 8", "8"),
        ({"rank": 0}, "rank 0", "8"),
        ({"merge_method": "legoo"}, "legoo", "lego"),
        ({"parameters": {"unit": "raw"}}, "'unit'", "units"),
        ({"parameters": {"units": "cooked"}}, "cooked", "normalized"),
        ({"parameters": {"restarts": 1.5}}, "1.5", ""),
        ({"weights": [1.0]}, "1 weights for 2", ""),
        ({"weights": [1.0, float("nan")]}, "nan", "finite"),
        ({"weights": [0.0, 0.0]}, "all weights are 0", ""),
        ({"dtype": "int8"}, "int8", "bfloat16"),
        ({"scale": float("inf")}, "scale is inf", "finite"),
        ({"scale": float("nan")}, "scale is nan", "finite"),
    ],
)
def test_impossible_requests_are_refused_from_headers(
    options: dict[str, Any], message: str, remedy: str
) -> None:
    with pytest.raises(MethodError) as caught:
        plan_of(make_adapter("a"), make_adapter("b"), **options)
    assert message in str(caught.value)
    assert remedy in caught.value.remedy


def test_small_modules_keep_all_their_units() -> None:
    few = {"model.layers.0.self_attn.q_proj": (24, 16)}
    plan = plan_of(make_adapter("a"), make_adapter("b", shapes=few), rank=6)
    assert sorted(plan.ranks.values()) == [4, 4, 4, 6]
    assert any("3 modules have only 4 units" in note for note in plan.notes)


def with_head(name: str, rows: int, value: float) -> Adapter:
    from lora_merge.adapters.adapter import build_adapter
    from lora_merge.adapters.config import parse_config
    from lora_merge.files.tensor_file import TensorDict

    config, tensors = adapter_parts(modules_to_save=["score"])
    tensors["base_model.model.score.weight"] = torch.full((rows, 4), value)
    return build_adapter(name, parse_config(config, name), TensorDict(tensors))


def test_policies_for_what_is_not_low_rank() -> None:
    first, second = with_head("z", 2, 1.0), with_head("a", 2, 3.0)
    plan = plan_of(first, second, extras="average")
    assert [a.name for a in plan.extras["score.weight"]] == ["a", "z"]
    plan = plan_of(first, second, extras="first")
    assert [a.name for a in plan.extras["score.weight"]] == ["z"]
    plan = plan_of(first, second, extras="drop")
    assert not plan.extras
    assert plan.output.config["modules_to_save"] is None
    assert any("dropped 1" in note for note in plan.notes)
    with pytest.raises(AlignmentError, match=r"score\.weight"):
        plan_of(first, second, extras="error")
    with pytest.raises(AlignmentError, match=r"\[2, 4\] \(a\), \[5, 4\] \(b\)"):
        plan_of(with_head("a", 2, 1.0), with_head("b", 5, 1.0))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("merge_method: lego\nrnak: 3\nadapters: [{adapter: x}]", ["rnak", "rank"]),
        ("merge_method: lego\nrank: 3\nadapters: [{adaptr: x}]", ["adaptr", "adapter"]),
        ("merge_method: lego\nrank: few\nadapters: [{adapter: x}]", ["rank"]),
        ("merge_method: lego\nrank: 3\nadapters: []", ["adapters"]),
        ("merge_method: lego\nrank: 3\nextras: keep\nadapters: [{adapter: x}]", ["extras"]),
        ("version: 9\nmerge_method: lego\nrank: 3\nadapters: [{adapter: x}]", ["version"]),
        ("[1, 2]", ["mapping"]),
        ("a: [", ["YAML"]),
    ],
)
def test_bad_recipes_are_refused_by_name(text: str, words: list[str], tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError) as caught:
        read_recipe(path)
    said = f"{caught.value} {caught.value.remedy}"
    assert all(word in said for word in [str(path), *words])
    with pytest.raises(RecipeError, match="cannot read"):
        read_recipe(tmp_path / "none.yaml")


def test_recipes_survive_the_round_trip(folders: list[Path]) -> None:
    recipe = recipe_of(folders, rank=7, seed=5, dtype="float16", extras="drop", ranks="per-module")
    assert parse_recipe(yaml.safe_load(recipe.to_yaml()), "text") == recipe


def test_hub_references_are_pinned_in_recipes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    repo = tmp_path / "hub" / "models--user--repo"
    for commit, seed in (("a" * 40, 1), ("b" * 40, 2)):
        save_adapter(repo / "snapshots" / commit / "sub", seed=seed)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("a" * 40)
    for number, ref in enumerate(
        (
            "user/repo:sub",
            "user/repo@main:sub",
            "hf://user/repo/sub",
            "https://huggingface.co/user/repo/tree/main/sub",
        )
    ):
        first = make(Recipe("lego", (AdapterItem(ref),), 2), tmp_path / f"first{number}")
        (repo / "refs" / "main").write_text("b" * 40)  # the repository moves on
        again = read_recipe(tmp_path / f"first{number}" / "lora_merge.yaml")
        assert again.adapters[0].revision == "a" * 40
        assert make(again, tmp_path / f"again{number}") == first
        (repo / "refs" / "main").write_text("a" * 40)


def test_the_report_measures_the_distance_from_the_exact_sum(
    folders: list[Path], tmp_path: Path
) -> None:
    recipe = recipe_of(folders, rank=4, parameters={"balance": True})
    report = run_recipe(recipe, tmp_path / "out").report
    parts = [deltas(folder) for folder in folders]
    merged = deltas(tmp_path / "out")
    for module in report.modules:
        exact = sum(p[module.name] for p in parts if module.name in p)
        assert module.exact_norm == pytest.approx(float(exact.norm()), rel=1e-5)
        assert module.norm == pytest.approx(float(merged[module.name].norm()), rel=1e-5)
        error = float((merged[module.name] - exact).norm())
        assert module.error_norm == pytest.approx(error, rel=1e-4, abs=1e-6)
        assert sum(module.details["cluster_sizes"]) == module.num_units
    total = report.total()
    assert total.modules == 4
    json.dumps(report.to_dict(), allow_nan=False)


def test_reports_have_no_nan_for_zero_modules() -> None:
    silent = ModuleReport("m", 4, 2, 0.0, 0.0, 0.0)
    odd = ModuleReport("m", 4, 2, 0.0, 1.0, 1.0)
    assert GroupReport.of("all", [silent]).relative_error == 0.0
    assert GroupReport.of("all", [odd]).relative_error is None
    json.dumps(MergeReport((silent, odd), (), None, 0).to_dict(), allow_nan=False)


def test_what_a_method_says_of_each_expert_counts_as_that_of_a_module() -> None:
    plain = ModuleReport("a", 4, 2, 1.0, 1.0, 0.0, details={"cluster_sizes": [3, 1]})
    stacked = ModuleReport(
        "b", 4, 2, 1.0, 1.0, 0.0,
        details={"experts": [{"cluster_sizes": [2, 2]}, {"cluster_sizes": [4]}]},
    )  # fmt: skip
    assert GroupReport.of("all", [plain, stacked]).largest_clusters == (3.0, 4)
    assert stacked.said("cluster_sizes") == [[2, 2], [4]] and stacked.said("shrink") == []


def test_a_full_disk_is_our_error_and_leaves_nothing(
    folders: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno
    import os

    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(LoraMergeError, match="No space left"):
        make(recipe_of(folders), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".*"))
