"""A search goes on after a kill as if nothing had happened, and its recipe makes its bytes."""

import json
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import lora_merge
from builders import adapter_parts, make_adapter, save_adapter, save_parts
from lora_merge.adapters.adapter import Adapter
from lora_merge.cli.app import run
from lora_merge.errors import LoraMergeError, MethodError
from lora_merge.evaluation.picture import draw_study
from lora_merge.evaluation.search import search
from lora_merge.evaluation.search_space import OVER, SearchSpace
from lora_merge.merge.plan import plan_merge
from lora_merge.merge.recipe.read import as_recipe
from lora_merge.merge.run import PlannedMerge

EXAMPLES = Path(__file__).parents[2] / "examples"
BASE, DATA = EXAMPLES / "base", EXAMPLES / "data" / "test.jsonl"
ADAPTERS = [str(EXAMPLES / "adapters" / name) for name in ("double", "reverse", "upper")]
SETTINGS = {"base": BASE, "data": DATA, "metric": "loss", "batch_size": 64}


def recipe(**changes) -> dict:
    return {"merge_method": "svd", "adapters": ADAPTERS, "rank": 8, **changes}


def test_the_winner_is_no_worse_than_the_start_and_its_recipe_makes_its_bytes(tmp_path) -> None:
    result = search(recipe(scale=0.3), trials=6, over=["scale"], **SETTINGS)
    start, best = result.trials[0], result.best
    assert start.values == {"scale": 0.3}
    assert best.scores["all"] == min(t.scores["all"] for t in result.trials) < start.scores["all"]
    assert result.front == (best.number,)
    lora_merge.run_recipe(result.recipe, tmp_path / "one")
    lora_merge.run_recipe(tmp_path / "one" / "lora_merge.yaml", tmp_path / "two")
    weights = [(tmp_path / n / "adapter_model.safetensors").read_bytes() for n in ("one", "two")]
    assert weights[0] == weights[1]
    # Held-out scores are those of `evaluate` on the rows that were held out.
    assert set(result.held_out) == {"base", "start", "winner"}
    assert result.held_out["winner"]["all"] < result.held_out["base"]["all"]


def test_a_study_goes_on_as_if_nothing_had_happened(tmp_path) -> None:
    whole = search(recipe(), trials=5, over=["scale"], **SETTINGS)
    for trials in (2, 5):
        parts = search(
            recipe(), trials=trials, over=["scale"], study=tmp_path / "study.db", **SETTINGS
        )
    assert [t.values for t in parts.trials] == [t.values for t in whole.trials]
    assert parts.recipe == whole.recipe
    for _ in range(2):  # the second time over the first
        drawn = draw_study(tmp_path / "study.db", tmp_path)
    assert [file.name for file in drawn] == ["history.png", "values.png"]
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in drawn)
    with pytest.raises(LoraMergeError, match=r"of another search \(over differ"):
        search(recipe(), trials=6, over=["weights"], study=tmp_path / "study.db", **SETTINGS)


@pytest.mark.timeout(200)
def test_a_killed_search_ends_with_the_same_best(tmp_path) -> None:
    arguments = ["search", *ADAPTERS, "--rank", "8", "--base", BASE, "--data", DATA]
    arguments += ["--metric", "loss", "--trials", "5", "--over", "scale", "--batch-size", "64"]
    arguments = [str(a) for a in arguments]
    whole = search(recipe(scale="auto"), trials=5, over=["scale"], **SETTINGS)
    out = tmp_path / "best"
    command = [sys.executable, "-m", "lora_merge", *arguments, "-o", str(out), "--json"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    study = tmp_path / "best.search" / "study.db"
    deadline = time.monotonic() + 120
    while _ended(study) < 2 and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not out.exists() or process.returncode == 0
    assert run([*arguments, "-o", str(out), "--force"]) == 0
    report = json.loads((tmp_path / "best.search" / "report.json").read_text())
    assert report["best"]["values"] == whole.best.values
    assert Adapter.from_pretrained(out).modules


def _ended(study: Path) -> int:
    import sqlite3

    if not study.exists():
        return 0
    try:
        with sqlite3.connect(f"file:{study}?mode=ro", uri=True) as reader:
            found = reader.execute("select count(*) from trials where state = 'COMPLETE'")
            return int(found.fetchone()[0])
    except sqlite3.OperationalError:  # the tables are being made
        return 0


def test_what_may_vary_is_what_the_recipe_says(tmp_path) -> None:
    from optuna.trial import FixedTrial

    refs = [str(save_adapter(tmp_path / name, seed=i)) for i, name in enumerate("ab")]
    start = as_recipe({"merge_method": "svd", "adapters": refs, "rank": 4})
    adapters = [Adapter.from_pretrained(ref) for ref in refs]

    def merged(over: list[str], **values) -> Adapter:
        space = SearchSpace.of(start, adapters, over)
        made = space.recipe_of(FixedTrial(values))
        return PlannedMerge(plan_merge(made, adapters)).run()

    def plain(weights, **settings) -> Adapter:
        settings = {"scale": 1.0, **settings}
        return lora_merge.merge(adapters, method="svd", rank=4, weights=weights, **settings)

    def same(one: Adapter, two: Adapter) -> bool:
        return all(
            torch.equal(x, y)
            for name in one.modules
            for x, y in zip(one.read(name), two.read(name), strict=True)
        )

    ups = {"filter": "*.up_proj", "value": 0.0}
    assert same(merged(["scale"], scale=0.5), plain([1.0, 1.0], scale=0.5))
    assert same(merged(["weights"], **{"weight.0": 0.2, "weight.1": 1.3}), plain([0.2, 1.3]))
    layers = {f"weight.{i}.{j}": 0.3 * i + 0.2 * j for i in range(2) for j in range(3)}
    assert same(merged(["layers"], **layers), plain([[0.0, 0.2, 0.4], [0.3, 0.5, 0.7]]))
    keep = {f"keep.{i}.{k}": True for i in range(2) for k in ("q_proj", "up_proj")}
    assert same(merged(["modules"], **keep), plain([1.0, 1.0]))
    keep["keep.1.up_proj"] = False
    rest = [ups, {"filter": "*", "value": 1.0}]
    assert same(merged(["modules"], **keep), plain([1.0, rest]))


def test_a_scale_that_is_to_be_decided_is_where_the_search_starts() -> None:
    result = search(recipe(scale="auto"), trials=1, over=["scale"], **SETTINGS)
    decided = lora_merge.merge(ADAPTERS, method="svd", rank=8)
    assert f"scale: {result.best.values['scale']}" in decided.texts["lora_merge.yaml"]


@pytest.mark.parametrize(
    ("over", "methods", "why"),
    [
        (["scales"], [], "cannot vary 'scales'"),
        (["weights", "layers"], [], "both say what the weights are"),
        (["method"], [], "needs to know which"),
        (["scale"], ["ties"], "needs to know which"),
        (["kinds", "modules"], [], "can be zero already"),
    ],
)
def test_what_cannot_vary_is_refused(over, methods, why) -> None:
    adapters = [make_adapter("a"), make_adapter("b", seed=1)]
    start = as_recipe({"merge_method": "svd", "adapters": ["a", "b"], "rank": 4})
    with pytest.raises(MethodError, match=why):
        SearchSpace.of(start, adapters, over, methods)


def test_methods_with_their_own_numbers_can_all_be_merged() -> None:
    result = search(
        recipe(), trials=6, over=["method", "parameters"], methods=["ties", "dare", "svd", "tsv"],
        sampler="random", **SETTINGS,
    )  # fmt: skip
    assert len({t.values["method"] for t in result.trials}) > 1
    assert not any(t.failed for t in result.trials)


def test_several_objectives_give_a_front() -> None:
    result = search(recipe(), trials=6, over=["weights"], pareto=True, **SETTINGS)
    tasks = ("double", "reverse", "upper")
    for trial in result.trials:
        beaten = any(
            all(o.scores[t] <= trial.scores[t] for t in tasks)
            and any(o.scores[t] < trial.scores[t] for t in tasks)
            for o in result.trials
        )
        assert beaten == (trial.number not in result.front)
    assert result.best.number in result.front


def test_every_word_of_what_may_vary_is_explained() -> None:
    page = (Path(__file__).parents[2] / "docs" / "evaluate.md").read_text()
    assert all(f"`{word}`" in page for word in OVER)


def test_rows_of_odd_tasks(tmp_path) -> None:
    """A task of one row is never held out; rows beside tasks that name none are refused."""
    rows = [{"prompt": f"copy: {w} >", "response": f" {w}", "task": w[0]} for w in ("ax", "bx")]
    data = tmp_path / "rows.jsonl"
    data.write_text(
        "".join(json.dumps(row) + "\n" for row in (*rows * 3, {**rows[0], "task": "c"}))
    )
    how = {**SETTINGS, "data": data}
    found = search(recipe(), trials=2, over=["scale"], **how)
    assert set(found.best.scores) == {"a", "b", "c", "all"}
    for name, scores in found.held_out.items():
        assert scores["all"] == pytest.approx((scores["a"] + scores["b"]) / 2), name
        assert set(scores) == {"a", "b", "all"}
    data.write_text(
        "".join(json.dumps(row) + "\n" for row in (*rows * 3, {"prompt": "a", "response": "b"}))
    )
    with pytest.raises(LoraMergeError, match="1 of 7 rows name no task"):
        search(recipe(), trials=2, over=["scale"], **how)


def test_a_search_in_which_everything_overflows_ends(tmp_path) -> None:
    shapes = {f"model.layers.0.mlp.{name}_proj": (160, 64) for name in ("gate", "up")}
    config, tensors = adapter_parts(shapes=shapes, alpha=10**14)
    huge = save_parts(tmp_path / "huge", config, {n: t * 1e4 for n, t in tensors.items()})
    start = {"merge_method": "svd", "adapters": [str(huge)], "scale": 1.0}
    with pytest.raises(LoraMergeError, match=r"no trial could be merged and scored; .* infinite"):
        search(start, trials=2, over=["scale"], sampler="random", **SETTINGS)


def test_a_study_may_have_any_name_and_is_refused_when_it_is_damaged(tmp_path) -> None:
    study = tmp_path / "a?b=%20{x}#c" / "study.db"
    how = {**SETTINGS, "over": ["scale"], "sampler": "random", "study": study}
    search(recipe(), trials=1, **how)
    assert [path.name for path in tmp_path.iterdir()] == ["a?b=%20{x}#c"] and study.is_file()
    assert len(search(recipe(), trials=2, **how).trials) == 2
    whole = study.read_bytes()
    for change in (
        "UPDATE trial_params SET param_value = 'much'",
        "UPDATE trial_user_attributes SET value_json = '[1]'",
        "UPDATE study_user_attributes SET value_json = '{'",
        "UPDATE trials SET state = 'gone'",
        "DROP TABLE trial_values",
        "UPDATE study_directions SET study_id = 7",
    ):
        with sqlite3.connect(study) as base:
            base.execute(change)
        base.close()
        with pytest.raises(LoraMergeError, match="no study that can be read"):
            search(recipe(), trials=2, **how)
        study.write_bytes(whole)
