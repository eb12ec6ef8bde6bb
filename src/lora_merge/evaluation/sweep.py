"""Candidates for eyes to choose from: recipes spread over what may vary, each written out."""

import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lora_merge.arguments import checked
from lora_merge.errors import MethodError
from lora_merge.evaluation.search_space import SearchSpace
from lora_merge.evaluation.study import optuna_module
from lora_merge.files.atomic import atomic_directory
from lora_merge.merge.api import run_recipe
from lora_merge.merge.auto.scale import with_scale
from lora_merge.merge.plan import plan_merge
from lora_merge.merge.recipe.read import as_recipe, open_recipe
from lora_merge.merge.recipe.recipe import Recipe
from lora_merge.options import LARGEST_SEED
from lora_merge.printing import Report, Summary

SWEEP = "sweep.json"
MOST = 10_000  # candidates
# The scale alone goes from the start over this to the start times this.
_AROUND = 2.0


@dataclass(frozen=True)
class Candidate:
    """One adapter to look at.

    Attributes:
        name: Its directory in the sweep's.
        values: What varied, by name.
    """

    name: str
    values: dict[str, Any]


@dataclass(frozen=True, repr=False)
class Sweep(Report):
    """What was written.

    Attributes:
        out: The directory.
        candidates: The recipe as it came, then the others.
    """

    out: str
    candidates: tuple[Candidate, ...]

    def summary(self) -> Summary:
        """Every candidate and what it is."""
        facts = [(c.name, said(c.values)) for c in self.candidates]
        return Summary(f"Sweep {self.out}", tuple(facts))

    def rows(self) -> list[dict[str, Any]]:
        """One mapping per candidate."""
        return [{"name": c.name, **c.values} for c in self.candidates]

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {"schema": 1, "out": self.out, "candidates": [vars(c) for c in self.candidates]}


def said(values: dict[str, Any]) -> str:
    """Values in a line."""
    return ", ".join(
        f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in values.items()
    )


@checked()
def sweep(
    recipe: Recipe | dict[str, Any] | str | Path,
    out: str | Path,
    *,
    count: int = 8,
    over: Sequence[str] = ("scale",),
    methods: Sequence[str] = (),
    seed: int = 0,
    force: bool = False,
    jobs: int | None = None,
    device: str = "auto",
    on_candidate: Callable[[], None] | None = None,
) -> Sweep:
    """Write candidates for eyes to choose from: no rows, no score, no base model.

    The first is the recipe as it came. A scale alone is spread evenly from half to twice it; what
    has several numbers by a scrambled Sobol sequence, which leaves no gaps.

    Args:
        recipe: Where to start, as for `run_recipe`.
        out: The directory to make: `candidate-1`, ..., adapters with their recipes, and sweep.json.
        count: How many.
        over: What may vary, as for `search`.
        methods: The methods to choose from, if `over` names "method".
        seed: Of the spread.
        force: Replace a directory that lora-merge wrote.
        jobs: Worker threads.
        device: Where to compute.
        on_candidate: Called after each.

    Raises:
        LoraMergeError: If recipe and adapters do not fit together, or nothing can be written.

    Examples:
        >>> import lora_merge
        >>> start = {"merge_method": "svd", "adapters": ["examples/adapters/*"], "scale": 0.5}
        >>> found = lora_merge.sweep(start, "candidates", count=3)
        >>> [candidate.values["scale"] for candidate in found.candidates]
        [0.5, 0.25, 1.0]
    """
    if not 2 <= count <= MOST:
        raise MethodError(f"a sweep of {count} is no choice for eyes", f"from 2 to {MOST}")
    if not 0 <= seed <= LARGEST_SEED:
        raise MethodError(f"no seed {seed}", f"from 0 to {LARGEST_SEED}")
    start, out = as_recipe(recipe), Path(out)
    adapters = open_recipe(start)
    plan = plan_merge(start, adapters)
    if "scale" in over:
        start = replace(start, scale=float(with_scale(plan).semantics.factor))
    space = SearchSpace.of(start, adapters, over, methods)
    found = []
    with atomic_directory(out, force=force) as staging:
        spread = _line(start, count) if tuple(over) == ("scale",) else _sobol(space, count, seed)
        for number, (values, varied) in enumerate(spread, 1):
            name = f"candidate-{number}"
            run_recipe(varied, staging / name, jobs=jobs, device=device)
            found.append(Candidate(name, values))
            if on_candidate is not None:
                on_candidate()
        report = Sweep(str(out), tuple(found))
        text = json.dumps(report.to_dict(), indent=2) + "\n"
        (staging / SWEEP).write_text(text, encoding="utf-8")
    return report


def _line(start: Recipe, count: int) -> Iterator[tuple[dict[str, Any], Recipe]]:
    """The scale as it came, and others in equal ratios around it; an odd one is a smaller one."""
    middle, many = float(start.scale), count - 1 if count % 2 else count
    powers = [2 * i / (many - 1) - 1 for i in range(many)]
    if len(powers) == count:
        powers.remove(min(power for power in powers if power > 0))
    for scale in (middle, *(middle * _AROUND**power for power in powers)):
        yield {"scale": scale}, replace(start, scale=scale)


def _sobol(space: SearchSpace, count: int, seed: int) -> Iterator[tuple[dict[str, Any], Recipe]]:
    optuna = optuna_module()
    with warnings.catch_warnings():  # that the sampler is experimental
        warnings.simplefilter("ignore")
        sampler = optuna.samplers.QMCSampler(
            seed=seed, scramble=True, warn_asynchronous_seeding=False
        )
        study = optuna.create_study(sampler=sampler)
        study.enqueue_trial(space.start())
        for _ in range(count):
            trial = study.ask()
            recipe = space.recipe_of(trial)
            study.tell(trial, 0.0)
            yield dict(trial.params), recipe
