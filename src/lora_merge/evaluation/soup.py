"""Soups: averages of checkpoints or runs that score better on rows than the best of them alone."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from lora_merge.adapters.access.coerce import open_adapters
from lora_merge.adapters.adapter import Adapter
from lora_merge.adapters.alignment import align
from lora_merge.arguments import takes
from lora_merge.errors import MethodError
from lora_merge.evaluation.bench import Bench, open_bench
from lora_merge.evaluation.options import MakeSoup
from lora_merge.evaluation.rows import ALL
from lora_merge.merge.plan import plan_merge
from lora_merge.merge.recipe.recipe import AdapterItem, Recipe
from lora_merge.merge.run import PlannedMerge
from lora_merge.planning import counted
from lora_merge.printing import Report, Summary


@dataclass(frozen=True)
class Ingredient:
    """One adapter's turn.

    Attributes:
        adapter: Its name.
        alone: Its own score on the rows to choose on.
        stirred: The soup's score with it.
        kept: Whether the soup is no worse with it.
    """

    adapter: str
    alone: float
    stirred: float
    kept: bool


@dataclass(frozen=True, repr=False)
class Soup(Report):
    """What a greedy soup came to.

    Attributes:
        metric: What was measured.
        higher: Whether more is better.
        recipe: The mean of those that were kept; `run_recipe` writes it.
        ingredients: All, the best alone first.
        held_out: Score of "best alone", "all" (the uniform soup) and "soup" on rows that chose
            nothing.
    """

    metric: str
    higher: bool
    recipe: Recipe
    ingredients: tuple[Ingredient, ...]
    held_out: dict[str, float]

    def summary(self) -> Summary:
        """Who is in it, and what it scores."""
        kept = [i.adapter for i in self.ingredients if i.kept]
        facts = [("in it", ", ".join(kept))]
        facts += [(name, f"{score:.4g}") for name, score in self.held_out.items()]
        return Summary(f"Soup of {len(kept)} of {len(self.ingredients)}, {self.metric}", (*facts,))

    def rows(self) -> list[dict[str, Any]]:
        """One mapping per ingredient."""
        return [vars(ingredient) for ingredient in self.ingredients]

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        import yaml

        return {
            "schema": 1,
            "metric": self.metric,
            "higher_is_better": self.higher,
            "recipe": yaml.safe_load(self.recipe.to_yaml()),
            "ingredients": self.rows(),
            "held_out": self.held_out,
        }


@takes(MakeSoup)
def soup(given: MakeSoup) -> Soup:
    """A greedy soup (Wortsman et al., ICML 2022, arXiv 2203.05482) of adapters of one task.

    The best alone comes first; each of the others, best first, stays if the mean of all who are in
    it is no worse with it. The model is loaded once; means are put into it and taken out again.

    Raises:
        MethodError: If there are fewer than two adapters.
        LoraMergeError: If adapters, rows and model do not fit together.

    Examples:
        >>> import lora_merge
        >>> found = lora_merge.soup("examples/adapters/*", base="examples/base",
        ...                         data="examples/data/test.jsonl", metric="loss")
        >>> found.ingredients[0].kept, len(found.ingredients)
        (True, 3)
    """
    opened = open_adapters(given.adapters)
    if len(opened) < 2:
        raise MethodError("a soup of one is that one", "give several checkpoints or runs")
    align(opened)  # refused before a model is loaded
    bench = open_bench(given)
    choose, report = bench.rows.split(given.held_out, given.seed)
    chosen, reported = replace(bench, rows=choose), replace(bench, rows=report)
    sign = 1 if bench.metric.higher else -1
    step = counted(given.progress, "scoring", 2 * len(opened) - 1)

    def score(members: Sequence[Adapter]) -> float:
        found = _mean_score(chosen, members, given.rank)
        step()
        return found

    alone = [score([adapter]) for adapter in opened]
    # Of equals the first, so that the order of their names does not say more than their scores.
    order = sorted(range(len(opened)), key=lambda i: (-sign * alone[i], i))
    members, best = [opened[order[0]]], alone[order[0]]
    ingredients = [Ingredient(members[0].name, best, best, kept=True)]
    for i in order[1:]:
        stirred = score([*members, opened[i]])
        kept = sign * stirred >= sign * best
        ingredients.append(Ingredient(opened[i].name, alone[i], stirred, kept))
        if kept:
            members, best = [*members, opened[i]], stirred
    last = {"best alone": members[:1], "all": opened, "soup": members}
    return Soup(
        bench.metric.name,
        bench.metric.higher,
        _mean_of(members, given.rank),
        tuple(ingredients),
        {name: _mean_score(reported, parts, given.rank) for name, parts in last.items()},
    )


def _mean_of(members: Sequence[Adapter], rank: int | str | None) -> Recipe:
    items = tuple(AdapterItem(adapter.name) for adapter in members)
    return Recipe(merge_method="mean", adapters=items, rank=rank)


def _mean_score(bench: Bench, members: Sequence[Adapter], rank: int | str | None) -> float:
    """Score of the members' mean."""
    if len(members) == 1:
        return bench.score(members[0])[ALL]
    return bench.score(PlannedMerge(plan_merge(_mean_of(members, rank), members)).run())[ALL]
