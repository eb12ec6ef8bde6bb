"""Weights by module, rank rules, choosing, and what every method's output is worth to others."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import lora_merge
from builders import SHAPES, adapter_parts, make_adapter, save_adapter, save_parts
from lora_merge.adapters.adapter import Adapter, build_adapter
from lora_merge.adapters.alignment import align, read_stacks
from lora_merge.adapters.config import parse_config
from lora_merge.adapters.module_names import count_layers
from lora_merge.errors import LoraMergeError, MethodError
from lora_merge.files.tensor_file import TensorDict
from lora_merge.merge.auto.method import choose
from lora_merge.merge.elementwise.combine import merge_tensor
from lora_merge.merge.elementwise.rule import preset
from lora_merge.merge.methods.registry import methods
from lora_merge.merge.plan import plan_merge
from lora_merge.merge.recipe.by_module import ByModule
from lora_merge.merge.recipe.read import parse_recipe
from lora_merge.merge.recipe.recipe import AdapterItem, Recipe

# Methods that need statistics are tested with them in test_statistics.
ROWS = sorted((m for m in methods().values() if not m.needs), key=lambda m: m.name)
# These see A and B apart and need adapters of one rank.
EQUAL_RANKS = {"linear-factors", "robustmerge", "aligned-mean"}


def deltas(adapter: Adapter) -> dict[str, torch.Tensor]:
    alignment = align([adapter])
    return {m.name: next(read_stacks(alignment, m)).delta() for m in alignment.modules}


def some_adapters(method: Any) -> list[Adapter]:
    ranks = (4, 4, 4) if method.name in EQUAL_RANKS else (4, 2, 3)
    count = method.adapters[1] or 3
    return [
        make_adapter(f"adapter-{i}", r=r, seed=i, task_type=None)
        for i, r in enumerate(ranks[:count])
    ]


@pytest.mark.parametrize("method", ROWS, ids=lambda m: m.name)
def test_weight_zero_is_the_same_as_absent(method) -> None:
    adapters = some_adapters(method)
    silent = make_adapter("silent", r=4, seed=9)
    weights = [1.0, -0.5, 0.7][: len(adapters)]
    if method.normalize == "sum" or method.name in {"slerp", "karcher", "multislerp"}:
        weights = [1.0, 0.5, 0.7][: len(adapters)]
    without = lora_merge.merge(adapters, method=method.name, weights=weights, rank=3)
    beside = lora_merge.merge(
        [silent, *adapters], method=method.name, weights=[0.0, *weights], rank=3
    )
    for name, delta in deltas(without).items():
        assert torch.equal(delta, deltas(beside)[name])


@pytest.mark.parametrize("method", ROWS, ids=lambda m: m.name)
def test_names_order_and_jobs_do_not_matter(method) -> None:
    """What an adapter stores decides, for random masks, too; not where it lies."""
    adapters = some_adapters(method)
    weights = [1.0, 0.5, 0.7][: len(adapters)]
    first = lora_merge.merge(adapters, method=method.name, weights=weights, rank=3, jobs=1)
    renamed = [replace(a, name=n) for a, n in zip(adapters, "zyx", strict=False)]
    if not method.ordered:
        renamed, weights = renamed[::-1], weights[::-1]
    second = lora_merge.merge(renamed, method=method.name, weights=weights, rank=3, jobs=3)
    for name in first.modules:
        pairs = zip(first.read(name), second.read(name), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("method", ROWS, ids=lambda m: m.name)
def test_the_methods_own_rank_is_always_possible(method) -> None:
    """Adapters may have more units than the matrix has rows: elementwise results have not."""
    count = method.adapters[1] or 2
    wide = [make_adapter(f"a{i}", r=4, seed=i, shapes={"m.x": (2, 5)}) for i in range(count)]
    lora_merge.merge(wide, method=method.name)


@pytest.mark.parametrize("method", ROWS, ids=lambda m: m.name)
@pytest.mark.parametrize("rule", ["energy:0.9", "full"])
def test_a_rule_for_adapters_before_training(method, rule: str) -> None:
    if rule != "full" and method.makes_rank and not method.gauge_free:
        pytest.skip("takes no rule")
    config, tensors = adapter_parts(r=2, shapes={"m.x": (6, 5)})
    tensors = {name: t * ("lora_A" in name) for name, t in tensors.items()}
    fresh = build_adapter("fresh", parse_config(config, "fresh"), TensorDict(tensors))
    merged = lora_merge.merge([fresh, replace(fresh, name="again")], method=method.name, rank=rule)
    assert not deltas(merged)["m.x"].any()


def test_copies_of_an_adapter_are_dropped_apart() -> None:
    """Else DARE of copies would not average its noise out."""
    one = make_adapter("one", r=4, seed=1)
    copies = [replace(one, name=name) for name in ("b", "a")]
    arguments = {"method": "dare", "rank": "full", "parameters": {"density": 0.5}}
    single = deltas(lora_merge.merge([one], **arguments))
    merged = deltas(lora_merge.merge(copies, weights=[0.25, 0.75], **arguments))
    again = deltas(lora_merge.merge(copies[::-1], weights=[0.75, 0.25], **arguments))
    for name, exact in deltas(one).items():
        kept = [(d[name].abs() > 1e-6).double().mean() for d in (single, merged)]
        assert abs(kept[0] - 0.5) < 0.1 and abs(kept[1] - 0.75) < 0.1
        assert torch.equal(merged[name], again[name])
        assert not torch.allclose(merged[name], exact)


def dense_ties(adapters, names, densities, weights=(1.0, 1.0, 1.0)):
    """TIES of whole deltas, one density per adapter; oracle of the rule in test_elementwise."""
    parts = [deltas(a) for a in adapters]
    merged = {}
    for name in names:
        rules = [preset("ties", compat="peft", density=d[name]) for d in densities]
        x = torch.stack([p[name] for p in parts])
        merged[name] = merge_tensor(replace(rules[0], own=tuple(rules)), x, weights)
    return merged


def test_parameters_of_single_adapters(tmp_path: Path, capsys) -> None:
    from lora_merge.cli.app import run

    names = list(SHAPES)
    folders = [str(save_adapter(tmp_path / n, r=3, seed=i)) for i, n in enumerate("abc")]
    adapters = [Adapter.from_pretrained(f) for f in folders]
    filtered = [{"filter": "q_proj", "value": 0.9}]
    densities = [
        dict.fromkeys(names, 0.3),
        {n: 0.2 if ".0." in n else 0.8 for n in names},
        {n: 0.9 if "q_proj" in n else 0.5 for n in names},
    ]
    expected = dense_ties(adapters, names, densities)
    parameters = {"compat": "peft", "density": 0.5}
    own = [{"density": 0.3}, {"density": [0.2, 0.8]}, {"density": filtered}]
    merged = lora_merge.merge(
        adapters, method="ties", parameters=parameters, own_parameters=own, rank="full", scale=1
    )
    for name, delta in deltas(merged).items():
        torch.testing.assert_close(delta, expected[name])
    # The same from the command line, through the printed recipe, and from the resolved one.
    flags = ["--density", "0.3", "-p", "density=[0.2, 0.8]", "--compat", "peft", "--rank", "full"]
    flags += ["--scale", "1"]
    flags += ["--density", "[{filter: q_proj, value: 0.9}, {value: 0.5}]"]
    command = ["merge", *folders, "-M", "ties", *flags]
    assert run([*command, "-o", str(tmp_path / "one")]) == 0
    capsys.readouterr()
    assert run([*command, "--print-recipe"]) == 0
    (tmp_path / "recipe.yaml").write_text(capsys.readouterr().out)
    assert run(["run", str(tmp_path / "recipe.yaml"), "-o", str(tmp_path / "two")]) == 0
    again = str(tmp_path / "one" / "lora_merge.yaml")
    assert run(["run", again, "-o", str(tmp_path / "three")]) == 0
    first = tmp_path / "one"
    for other in ("two", "three"):
        for file in ("adapter_model.safetensors", "lora_merge.yaml"):
            assert (first / file).read_bytes() == (tmp_path / other / file).read_bytes()


def test_a_gradient_among_the_methods_parameters_is_every_adapters() -> None:
    adapters = [make_adapter(f"adapter-{i}", r=3, seed=i) for i in range(3)]
    by_layer = {n: 0.2 if ".0." in n else 0.8 for n in SHAPES}
    parameters = {"compat": "peft", "density": [0.2, 0.8]}
    merged = lora_merge.merge(adapters, method="ties", parameters=parameters, rank="full", scale=1)
    expected = dense_ties(adapters, list(SHAPES), [by_layer] * 3)
    for name, delta in deltas(merged).items():
        torch.testing.assert_close(delta, expected[name])


@pytest.mark.parametrize(
    ("own", "words"),
    [
        ([{}, {}], "2 mappings"),
        ([{}, {}, {"elect": "none"}], "adapter-2.*'elect' for single adapters"),
        ([{}, {}, {"density": 2.0}], "adapter-2.*density is 2.0"),
        ([{}, {}, {"density": "much"}], "is no density"),
        ([{}, {}, {"density": [0.1, 0.5]}], "from module to module"),  # TIES ranks globally
    ],
)
def test_parameters_that_single_adapters_cannot_have(own, words) -> None:
    adapters = [make_adapter(f"adapter-{i}", r=4, seed=i) for i in range(3)]
    with pytest.raises(MethodError, match=words) as caught:
        lora_merge.merge(adapters, method="ties", own_parameters=own)
    assert caught.value.remedy


@pytest.mark.parametrize("method", ROWS, ids=lambda m: m.name)
def test_every_result_loads_in_peft_with_the_same_delta(method, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    from torch import nn

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.self_attn = nn.ModuleDict({"q_proj": nn.Linear(16, 24)})
            self.mlp = nn.ModuleDict({"up_proj": nn.Linear(16, 40)})

    class Tiny(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = nn.ModuleDict({"layers": nn.ModuleList([Block(), Block()])})

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    rank: int | None = 3 if method.rank == "largest" else None
    merged = lora_merge.merge(some_adapters(method), method=method.name, rank=rank)
    merged.save_pretrained(tmp_path / "merged")
    loaded = peft.PeftModel.from_pretrained(Tiny(), str(tmp_path / "merged"))
    for name, delta in deltas(merged).items():
        layer = loaded.base_model.model.get_submodule(name)
        torch.testing.assert_close(layer.get_delta_weight("default"), delta)


def test_weights_by_layer_and_by_name() -> None:
    gradient = ByModule.of([0.0, 1.0])
    assert [gradient.at(f"model.layers.{i}.mlp.up", 5) for i in range(5)] == [0, 0.25, 0.5, 0.75, 1]
    assert gradient.at("model.embed_tokens", 5) == 0 and gradient.at("lm_head", 5) == 1
    cases = ByModule.of(
        [{"filter": "q_proj", "value": 2}, {"filter": "*.1.mlp*", "value": 3}, {"value": [1, 0]}]
    )
    assert cases.at("layers.0.self_attn.q_proj", 2) == 2
    assert cases.at("layers.1.mlp.up", 2) == 3
    assert cases.at("layers.0.mlp.up", 2) == 1
    assert ByModule.of([{"filter": "q_proj", "value": 2}]).at("layers.0.mlp.up", 2) is None
    assert ByModule.of(cases.to_data()) == cases
    assert count_layers(list(SHAPES)) == 2
    for wrong in ("much", float("nan"), [1, "x"], [{"filter": "a"}], True):
        with pytest.raises(MethodError, match="weight"):
            ByModule.of(wrong)


def test_module_weights_in_a_merge() -> None:
    one, two = make_adapter("one", r=2, seed=1), make_adapter("two", r=3, seed=2)
    merged = lora_merge.merge(
        [one, two], method="cat", weights=[[1.0, 0.5], [{"filter": "q_proj", "value": -2.0}]]
    )
    first, second, found = deltas(one), deltas(two), deltas(merged)
    for name, delta in found.items():
        expected = first[name] * (1.0 if ".0." in name else 0.5)
        if "q_proj" in name:
            expected = expected - 2 * second[name]
        torch.testing.assert_close(delta, expected)


def test_rank_rules_choose_over_all_modules() -> None:
    adapters = [make_adapter(f"adapter-{i}", r=4, seed=i) for i in range(2)]
    whole = lora_merge.merge(adapters, method="cat")
    spectra = {n: torch.linalg.svdvals(d.double()) for n, d in deltas(whole).items()}
    merged = lora_merge.merge(
        adapters, method="svd", rank="energy:0.8", ranks="per-module", scale=1
    )
    for name, spec in merged.modules.items():
        energy = spectra[name].square().cumsum(0) / spectra[name].square().sum()
        assert energy[spec.rank - 1] >= 0.8 and (spec.rank == 1 or energy[spec.rank - 2] < 0.8)
        u, s, vh = torch.linalg.svd(deltas(whole)[name].double(), full_matrices=False)
        best = (u[:, : spec.rank] * s[: spec.rank]) @ vh[: spec.rank]
        torch.testing.assert_close(deltas(merged)[name].double(), best, rtol=1e-4, atol=1e-6)
    half = lora_merge.merge(adapters, method="svd", rank="budget:x0.5", ranks="per-module", scale=1)
    assert half.num_parameters <= whole.num_parameters / 2
    assert len(half.ranks()) > 1


@pytest.mark.parametrize("method", ["ties", "dare", "breadcrumbs"])
def test_rules_for_ranks_see_the_whole_merged_delta(method) -> None:
    """An elementwise merge has full rank: a rule's share is one of all its energy."""
    adapters = [make_adapter(f"adapter-{i}", r=2, seed=i) for i in range(3)]
    arguments = {"method": method, "parameters": {"density": 0.4}, "ranks": "per-module"}
    exact = deltas(lora_merge.merge(adapters, rank="full", **arguments))
    merged = lora_merge.merge(adapters, rank="energy:0.95", **arguments)
    assert any("full rank" in note for note in merged.notes)
    assert max(merged.ranks()) > 6  # R, the most that is left of a sum
    for name, spec in merged.modules.items():
        values = torch.linalg.svdvals(exact[name].double()).square()
        kept = values.cumsum(0) / values.sum()
        assert kept[spec.rank - 1] >= 0.95 > kept[spec.rank - 2]
        left_out = (exact[name] - deltas(merged)[name]).square().sum() / values.sum()
        assert float(left_out) == pytest.approx(1 - float(kept[spec.rank - 1]), rel=1e-3)
    wide = lora_merge.merge(adapters, rank=12, **arguments)
    assert set(wide.ranks()) == {12}
    with pytest.raises(MethodError, match="rank 17 is not possible"):
        lora_merge.merge(adapters, rank=17, **arguments)


def test_the_report_says_what_an_elementwise_merge_lost(tmp_path: Path, capsys) -> None:
    from lora_merge.cli.app import run

    folders = [str(save_adapter(tmp_path / n, r=2, seed=i)) for i, n in enumerate("abc")]
    adapters = [Adapter.from_pretrained(f) for f in folders]
    exact = deltas(lora_merge.merge(adapters, method="ties", rank="full", scale=1))
    for rank in ("2", "energy:0.7", "full"):
        out = tmp_path / rank
        command = ["merge", *folders, "-M", "ties", "--rank", rank, "-o", str(out), "--json"]
        assert run([*command, "--ranks", "per-module", "--scale", "1"]) == 0
        report = json.loads(capsys.readouterr().out)
        written = deltas(Adapter.from_pretrained(out))
        for module in report["modules"]:
            name = module["name"]
            lost = (exact[name] - written[name]).square().sum() / exact[name].square().sum()
            assert module["retained_energy"] == pytest.approx(1 - float(lost), abs=2e-5)


def test_the_plan_counts_merged_deltas_where_they_are_formed() -> None:
    shape = (3000, 2000)
    adapters = [make_adapter(n, r=2, seed=i, shapes={"p": shape}) for i, n in enumerate("ab")]
    items = tuple(AdapterItem(a.name) for a in adapters)
    peaks = [
        plan_merge(Recipe(merge_method=m, adapters=items), adapters).peak_bytes(1)
        for m in ("svd", "core-ties", "ties")
    ]
    assert peaks[1] == peaks[0] < peaks[2] - 4 * 3000 * 2000


def test_federated_adapters_keep_their_rank(tmp_path: Path) -> None:
    config, tensors = adapter_parts(r=4, seed=1)
    folders = []
    for index in range(3):
        _, other = adapter_parts(r=4, seed=10 + index)
        shared = {k: tensors[k] if "lora_A" in k else other[k] for k in tensors}
        folders.append(save_parts(tmp_path / str(index), config, shared))
    merged = lora_merge.merge(folders, method="fedavg")
    assert set(merged.ranks()) == {4}
    parts = [deltas(Adapter.from_pretrained(f)) for f in folders]
    for name, delta in deltas(merged).items():
        torch.testing.assert_close(delta, torch.stack([p[name] for p in parts]).mean(dim=0))
    chosen = lora_merge.merge(folders)
    assert any("auto chose fedavg" in note for note in chosen.notes)


def test_auto_says_what_it_chose() -> None:
    different = [make_adapter(f"adapter-{i}", r=4, seed=i) for i in range(3)]
    for adapters, rank, method in (
        (different, 4, "wudi-iso"),
        (different, "full", "wudi-iso"),
        (different[:2], 4, "wudi-iso"),
        (different[:1], 4, "svd"),
    ):
        merged = lora_merge.merge(adapters, rank=rank)
        assert any(f"auto chose {method}: " in note for note in merged.notes)
    config, tensors = adapter_parts(r=4, seed=1)
    alike = [
        build_adapter(
            f"seed-{i}",
            parse_config(config, "x"),
            TensorDict({k: t + 0.01 * i * t.abs().mean() for k, t in tensors.items()}),
        )
        for i in range(3)
    ]
    assert any("auto chose mean" in note for note in lora_merge.merge(alike).notes)


@pytest.mark.parametrize("alike", range(7))
def test_auto_looks_at_every_kind_of_module(alike: int) -> None:
    """Adapters that are the same in one kind of seven, and unrelated elsewhere, are not alike."""
    kinds = ["down", "gate", "k", "o", "q", "up", "v"]
    shapes = {f"layers.{n:02d}.{kind}": (6, 5) for n in range(16) for kind in kinds}
    config, tensors = adapter_parts(shapes=shapes, seed=0)
    _, others = adapter_parts(shapes=shapes, seed=1)
    mixed = {k: tensors[k] if f".{kinds[alike]}." in k else t for k, t in others.items()}
    pair = [
        build_adapter(name, parse_config(config, name), TensorDict(parts))
        for name, parts in (("one", tensors), ("two", mixed))
    ]
    assert choose(align(pair)).method == "wudi-iso"


def test_a_cut_that_loses_most_is_told_or_refused() -> None:
    adapters = [make_adapter(f"adapter-{i}", r=4, seed=i) for i in range(3)]
    merged = lora_merge.merge(adapters, method="svd", rank=1)
    assert any("% of the result's energy" in note for note in merged.notes)
    with pytest.raises(MethodError, match="energy"):
        lora_merge.merge(adapters, method="svd", rank=1, strict=True)
    lora_merge.merge(adapters, method="svd", rank=10, strict=True)


def test_a_saved_merge_is_the_same_as_a_run_recipe(tmp_path: Path) -> None:
    folders = [save_adapter(tmp_path / n, r=3, seed=i) for i, n in enumerate("ab")]
    merged = lora_merge.merge(folders, method="wudi", rank=3, scale=0.5)
    merged.save_pretrained(tmp_path / "saved")
    from lora_merge.cli.app import run

    recipe = str(tmp_path / "saved" / "lora_merge.yaml")
    assert run(["run", recipe, "-o", str(tmp_path / "again")]) == 0
    for name in ("adapter_model.safetensors", "adapter_config.json", "lora_merge.yaml"):
        assert (tmp_path / "saved" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    with pytest.raises(LoraMergeError):
        merged.save_pretrained(tmp_path / "saved")
    merged.save_pretrained(tmp_path / "saved", force=True)


def test_mergekit_words() -> None:
    text = """
    merge_method: dare_ties
    models:
      - model: a
        parameters: {weight: [0, 1], density: 0.4}
      - model: b
      - model: base
    base_model: base
    parameters:
      {normalize: true, lambda: 0.7, weight: 0.3, density: 0.5, int8_mask: true, rescale: true}
    out_dtype: bfloat16
    """
    recipe = parse_recipe(yaml.safe_load(text), "recipe")
    assert recipe.merge_method == "dare-ties"
    assert [i.weight for i in recipe.adapters] == [[0, 1], 0.3]
    assert recipe.parameters == {"density": 0.5}
    assert [i.parameters for i in recipe.adapters] == [{"density": 0.4}, {}]
    assert (recipe.normalize, recipe.scale, recipe.dtype) == ("sum", 0.7, "bfloat16")
    assert recipe.base_model == "base"
    text = "{merge_method: sce, models: [a, b], parameters: {select_topk: 0.1, rescale: false}}"
    recipe = parse_recipe(yaml.safe_load(text), "recipe")
    assert recipe.parameters == {"density": 0.1, "rescale": "none"}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{merge_method: ties, slices: []}", "slices"),
        ("{merge_method: ties, models: [a], adapters: [b]}", "both"),
        ("{merge_method: ties, models: [{model: a, parameters: [1]}]}", "no mapping"),
        ("{merge_method: svd, models: [a], rank: 'energy:2'}", "energy"),
        ("{merge_method: svd, models: [a], normalise: sum}", "normalise"),
    ],
)
def test_words_that_mean_nothing_are_refused(text, words) -> None:
    with pytest.raises(LoraMergeError, match=words):
        parse_recipe(yaml.safe_load(text), "recipe")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"method": "tsvv"}, "tsvv"),
        ({"method": "ties", "parameters": {"densty": 0.1}}, "densty"),
        ({"method": "ties", "parameters": {"density": 1.5}}, "density"),
        ({"method": "ties", "parameters": {"density": float("nan")}}, "density"),
        ({"method": "tsv", "space": "factors"}, "space"),
        ({"method": "slerp"}, "2 adapters"),
        ({"method": "lego", "rank": "energy:0.5"}, "needs a rank"),
        ({"method": "mean", "weights": [1.0, 1.0, -2.0]}, "add up to 0"),
        ({"method": "svd", "rank": 99}, "99"),
        ({"method": "della", "parameters": {"density": 0.99}}, "epsilon"),
    ],
)
def test_requests_that_cannot_be_met_are_refused(arguments, words) -> None:
    adapters = [make_adapter(f"adapter-{i}", r=4, seed=i) for i in range(3)]
    with pytest.raises(MethodError, match=words) as caught:
        lora_merge.merge(adapters, **arguments)
    assert caught.value.remedy


def test_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    from lora_merge.cli.app import run

    monkeypatch.setenv("COLUMNS", "80")
    assert run(["methods", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)["methods"]
    assert [m["name"] for m in listed] == list(methods())
    for name in [m["name"] for m in listed]:
        assert run(["methods", name]) == 0
        assert all(len(line) <= 80 for line in capsys.readouterr().out.splitlines())
    folders = [str(save_adapter(tmp_path / n, r=3, seed=i)) for i, n in enumerate("ab")]
    arguments = ["merge", *folders, "-M", "ties", "-p", "density=0.5", "-w", "1", "-w", "[0.1, 1]"]
    arguments += ["--rank", "energy:0.9", "--scale", "0.5", "--norm-equalise"]
    assert run([*arguments, "--print-recipe"]) == 0
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(capsys.readouterr().out)
    assert run([*arguments, "-o", str(tmp_path / "one")]) == 0
    assert run(["run", str(recipe), "-o", str(tmp_path / "two")]) == 0
    for name in ("adapter_model.safetensors", "lora_merge.yaml"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    capsys.readouterr()
    assert (
        run(
            [
                "merge",
                *folders,
                "-M",
                "ties",
                "--density",
                "0.5",
                "--compat",
                "peft",
                "--print-recipe",
            ]
        )
        == 0
    )
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["parameters"] == {"density": 0.5, "compat": "peft"}
    assert run(["merge", *folders, "-M", "tsv", "--density", "0.5"]) == 1
    assert "density" in capsys.readouterr().err
    assert run(["merge", *folders, "-M", "ties", "-p", "density"]) == 2
    assert run(["merge", *folders, "--rank", "1", "-M", "dare", "--strict", "-o", "x"]) == 1
    assert not Path("x").exists()
