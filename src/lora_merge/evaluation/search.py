"""Search a recipe's scale, weights, method and masks for the best score on rows (Optuna)."""

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_merge.adapters.adapter import Adapter
from lora_merge.arguments import takes
from lora_merge.errors import LoraMergeError
from lora_merge.evaluation.bench import Bench, open_bench
from lora_merge.evaluation.options import Search
from lora_merge.evaluation.rows import ALL, Rows, RowsError
from lora_merge.evaluation.search_space import SearchSpace
from lora_merge.evaluation.study import (
    ended,
    of_file,
    open_study,
    optuna_module,
    sampler_of,
    waiting,
)
from lora_merge.files.atomic import atomic_file
from lora_merge.files.documents import validated
from lora_merge.files.targets import check_file
from lora_merge.merge.api import run_recipe
from lora_merge.merge.auto.scale import with_scale
from lora_merge.merge.plan import plan_merge
from lora_merge.merge.recipe.read import as_recipe, open_recipe
from lora_merge.merge.recipe.recipe import Recipe
from lora_merge.merge.run import PlannedMerge
from lora_merge.planning import counted
from lora_merge.printing import Report, Summary

if TYPE_CHECKING:
    from optuna.study import Study

_FAILED = "failed"
_MARK = b'"schema": 1'


@dataclass(frozen=True)
class Trial:
    """One recipe that was tried.

    Attributes:
        number: In the order of the study.
        values: What varied, by name.
        scores: Task → score on the rows to choose on; `all` is the mean over the tasks.
        failed: Why there is no score, or "".
    """

    number: int
    values: dict[str, Any]
    scores: dict[str, float]
    failed: str = ""


@dataclass(frozen=True, repr=False)
class SearchResult(Report):
    """What a search found.

    Attributes:
        metric: What was measured.
        higher: Whether more is better.
        recipe: The winner.
        best: The winner's trial.
        trials: All that ended, in order.
        front: Trials that no other beats on every task (one objective: the winner alone).
        held_out: Score of "base", "start" (the recipe as it came, if it can be scored) and "winner"
            on rows that no trial saw, by task.
        mattered: Share of the spread of scores that each value explains (PED-ANOVA).
    """

    metric: str
    higher: bool
    recipe: Recipe
    best: Trial
    trials: tuple[Trial, ...]
    front: tuple[int, ...]
    held_out: dict[str, dict[str, float]]
    mattered: dict[str, float]

    def summary(self) -> Summary:
        """The winner's values, and how it does on rows that no trial saw."""
        held = [(f"held out, {name}", f"{one[ALL]:.4g}") for name, one in self.held_out.items()]
        values = [(name, _short(value)) for name, value in list(self.best.values.items())[:8]]
        title = f"Search: {len(self.trials)} trials, {self.metric}, trial {self.best.number} won"
        return Summary(title, (*held, *values))

    def rows(self) -> list[dict[str, Any]]:
        """One row per trial; values and scores that a trial does not have are None."""
        names = list(dict.fromkeys(n for trial in self.trials for n in trial.values))
        tasks = list(dict.fromkeys(n for trial in self.trials for n in trial.scores))
        return [
            {
                "number": trial.number,
                **{name: trial.values.get(name) for name in names},
                **{f"score {task}": trial.scores.get(task) for task in tasks},
                "failed": trial.failed,
            }
            for trial in self.trials
        ]

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        import yaml

        return {
            "schema": 1,
            "metric": self.metric,
            "higher_is_better": self.higher,
            "recipe": yaml.safe_load(self.recipe.to_yaml()),
            "best": vars(self.best),
            "front": list(self.front),
            "held_out": self.held_out,
            "mattered": self.mattered,
            "trials": [vars(trial) for trial in self.trials],
        }


@takes(Search)
def search(given: Search) -> SearchResult:
    """Find the recipe whose merge scores best.

    The model is loaded once; every trial is merged, put into it and taken out again in memory. The
    first trial is the recipe as it came. A study in a file goes on where it ended, and gives what
    one that was not interrupted gives; several processes may share it (`worker`).

    Raises:
        LoraMergeError: If recipe, rows and model do not fit together, a study in the file is of
            something else, or no trial could be scored.

    Examples:
        >>> import lora_merge
        >>> found = lora_merge.search(
        ...     {"merge_method": "svd", "adapters": ["examples/adapters/*"], "scale": 0.2},
        ...     base="examples/base", data="examples/data/test.jsonl", metric="loss",
        ...     over=["scale"], trials=3,
        ... )
        >>> len(found.trials), found.best.scores["all"] <= found.trials[0].scores["all"]
        (3, True)
    """
    optuna_module()
    from optuna.trial import FixedTrial

    start = as_recipe(given.recipe)
    adapters = open_recipe(start)
    plan = plan_merge(start, adapters)  # refused before a model is loaded
    if "scale" in given.over:
        start = replace(start, scale=with_scale(plan).semantics.scale)
    space = SearchSpace.of(start, adapters, given.over, given.methods)
    bench = open_bench(given)
    _refuse_nameless(bench.rows)
    choose, report = bench.rows.split(given.held_out, given.seed)
    chosen, reported = replace(bench, rows=choose), replace(bench, rows=report)
    tasks = choose.tasks or [ALL]
    wanted = {
        "recipe": start.to_yaml(),
        "over": list(given.over),
        "methods": list(given.methods),
        "rows": choose.sha256,
        "metric": bench.metric.name,
        "pareto": given.pareto,
        "held_out": given.held_out,
        "sampler": given.sampler,
        "seed": given.seed,
    }
    opened = open_study(given.study, wanted, len(tasks) if given.pareto else 1, bench.metric.higher)
    with of_file(given.study):
        done = len(ended(opened))
        if not done and not waiting(opened):
            opened.enqueue_trial(space.start())
    step = counted(given.progress, "searching", given.trials)
    while done < given.trials:
        opened.sampler = sampler_of(given.sampler, given.seed + done + 1_000_003 * given.worker)
        with of_file(given.study):
            asked = opened.ask()
            tried = space.recipe_of(asked)
        trial = _try(opened, asked, tried, adapters, chosen, tasks, given.pareto)
        with of_file(given.study):
            before, done = done, len(ended(opened))
        if done <= before:  # or it would never end
            raise LoraMergeError(
                f"{given.study} keeps no result of a trial", "name another file for the study"
            )
        step()
        if given.on_trial is not None:
            given.on_trial(trial)
    with of_file(given.study):
        trials = _trials_of(opened)
        front = tuple(sorted(trial.number for trial in opened.best_trials))
        best = _best_of(trials, front, bench.metric.higher)
        recipe = space.recipe_of(FixedTrial(best.values))
    seen = report.tasks or [ALL]  # a task of one row has none that was held out
    rows = {"base": reported.score(None)}
    with suppress(LoraMergeError):  # a start that could not be merged, or scored
        rows["start"] = _scores(start, adapters, reported, seen)
    rows["winner"] = _scores(recipe, adapters, reported, seen)
    return SearchResult(
        bench.metric.name,
        bench.metric.higher,
        recipe,
        best,
        trials,
        front,
        {name: _mean_over_tasks(scores, seen) for name, scores in rows.items()},
        _mattered(opened, sum(not trial.failed for trial in trials)),
    )


def _refuse_nameless(rows: Rows) -> None:
    """Refuse rows of which a mean over the tasks would leave some out."""
    nameless = sum(not row.task for row in rows.rows)
    if rows.tasks and nameless:
        raise RowsError(
            f"{nameless} of {len(rows.rows)} rows name no task, and others do",
            "name it in every row or in none",
        )


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def save_winner(result: SearchResult, out: Path, *, force: bool = False) -> None:
    """Write the winner's adapter into a directory; its recipe there makes the same bytes again."""
    run_recipe(result.recipe, out, force=force)


def check_report(path: Path) -> None:
    """Refuse a report that somebody else wrote, before anything is tried.

    Raises:
        OutputError: If it must not be replaced.
    """
    check_file(path, _MARK)


def save_report(result: SearchResult, path: Path) -> None:
    """Write everything a search found as one JSON file."""
    with atomic_file(path, "choose another place", mark=_MARK) as staging:
        staging.write_text(json.dumps(result.to_dict(), indent=2) + "\n", encoding="utf-8")


def _trials_of(study: "Study") -> tuple[Trial, ...]:
    """All that ended, in order."""
    found = []
    for one in ended(study):
        said = one.user_attrs
        scores = validated(dict[str, float], said.get("scores", {}), f"trial {one.number}")
        found.append(Trial(one.number, dict(one.params), scores, str(said.get(_FAILED, ""))))
    return tuple(found)


def _best_of(trials: Sequence[Trial], front: Sequence[int], higher: bool) -> Trial:
    """The best mean of the front."""
    scored = [trial for trial in trials if not trial.failed]
    if not scored:
        raise LoraMergeError(
            f"no trial could be merged and scored; the first: {trials[0].failed}",
            "widen what may vary",
        )
    sign = -1 if higher else 1
    members = (trial for trial in scored if trial.number in front)
    return min(members, key=lambda t: (sign * t.scores[ALL], t.number))


def _try(
    study: "Study",
    trial: Any,
    recipe: Recipe,
    adapters: Sequence[Adapter],
    bench: Bench,
    tasks: Sequence[str],
    pareto: bool,
) -> Trial:
    """One trial: merge, score, tell."""
    from optuna.trial import TrialState

    try:
        scores = _scores(recipe, adapters, bench, tasks)
    except LoraMergeError as error:  # a merge that these values do not allow
        trial.set_user_attr(_FAILED, str(error))
        study.tell(trial, state=TrialState.PRUNED)
        return Trial(trial.number, dict(trial.params), {}, str(error))
    trial.set_user_attr("scores", scores)
    study.tell(trial, [scores[task] for task in tasks] if pareto else scores[ALL])
    return Trial(trial.number, dict(trial.params), scores)


def _scores(
    recipe: Recipe, adapters: Sequence[Adapter], bench: Bench, tasks: Sequence[str]
) -> dict[str, float]:
    """Score of a recipe's merge by task; `all` is the mean over the tasks, whatever their rows."""
    merged = PlannedMerge(with_scale(plan_merge(recipe, adapters))).run()
    return _mean_over_tasks(bench.score(merged), tasks)


def _mean_over_tasks(scores: dict[str, float], tasks: Sequence[str]) -> dict[str, float]:
    return {**scores, ALL: sum(scores[task] for task in tasks) / len(tasks)}


def _mattered(study: "Study", scored: int) -> dict[str, float]:
    """What explains the spread of the scores; nothing where there are too few to tell."""
    from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances

    if scored < 8 or len(study.directions) > 1:
        return {}
    try:
        found = get_param_importances(study, evaluator=PedAnovaImportanceEvaluator())
    except (ValueError, RuntimeError, ZeroDivisionError):  # all scores alike
        return {}
    return {name: round(float(share), 4) for name, share in found.items() if share == share}
