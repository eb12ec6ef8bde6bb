"""`lora-merge search`: the scale, weights, method and masks that score best on your rows."""

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lora_merge.cli.shared.fields import options_of
from lora_merge.cli.shared.options import force_option, json_option
from lora_merge.cli.shared.texts import words
from lora_merge.evaluation.options import Search

if TYPE_CHECKING:
    from rich.console import RenderableType

    from lora_merge.evaluation.search import SearchResult


@click.command(
    epilog="""\b
Examples:
  lora-merge search math code chat --base ./llama --data rows.jsonl -o best
  lora-merge search recipe.yaml --base ./llama --data rows.jsonl \\
      --over scale,kinds --trials 200 -o best
  lora-merge search a b c --over scale,method --methods svd,tsv,ties ...
  lora-merge search a b c --over scale,modules --sampler cmaes ...

--over: scale; weights (one per adapter), layers or kinds (by layer, by kind of
module); method (of --methods); parameters (the method's own); modules (which
kinds of modules of which adapter to leave out).

OUT.search/study.db is an Optuna study: a search that was interrupted goes on
with the same command, several processes may share it (--worker 1, 2, ...), and
optuna-dashboard shows it. OUT.search/report.json has every trial, history.png
and values.png show them.
""",
)
@click.argument("adapters", nargs=-1, required=True, metavar="RECIPE|ADAPTER...")
@click.option("-M", "--method", default="svd", show_default=True, help="Method to start from.")
@click.option("--rank", help="Rank of the result, or a rank rule.")
@click.option(
    "--over", callback=words, default="scale,weights", show_default=True, help="What may vary."
)
@click.option("--methods", callback=words, help="Methods to choose from, with --over method.")
@options_of(Search)
@click.option(
    "-o", "--out", type=click.Path(path_type=Path), required=True, help="Directory to make."
)
@force_option("an adapter directory")
@json_option
def command(
    adapters: tuple[str, ...],
    method: str,
    rank: str | None,
    out: Path,
    force: bool,
    as_json: bool,
    **given: Any,
) -> None:
    """Try recipes around RECIPE, or around a merge of ADAPTERs, and write the best one's adapter.

    The report compares base, start and winner on rows that no trial has seen.
    """
    import lora_merge
    from lora_merge.cli.shared.api import shown_progress
    from lora_merge.cli.shared.open import check_out
    from lora_merge.cli.shared.output import Output
    from lora_merge.evaluation.picture import check_drawings, draw_study
    from lora_merge.evaluation.search import check_report, save_report, save_winner

    output = Output(as_json)
    recipe: Any = Path(adapters[0])
    if len(adapters) > 1 or recipe.suffix not in (".yaml", ".yml"):
        number = int(rank) if rank and rank.isdigit() else rank
        recipe = {"merge_method": method, "adapters": list(adapters), "rank": number}
        recipe["scale"] = "auto"
    check_out(out, *adapters, given["base"], given["data"], force=force)
    folder = out.parent / f"{out.name}.search"
    draws = find_spec("matplotlib") is not None
    if folder.is_dir():
        check_report(folder / "report.json")
        if draws:
            check_drawings(folder)
    with shown_progress(output) as progress:
        result = lora_merge.search(recipe, study=folder / "study.db", **given, progress=progress)
    save_report(result, folder / "report.json")
    drawn = draw_study(folder / "study.db", folder) if draws else []
    save_winner(result, out, force=force)
    output.data(result.to_dict(), *search_view(result))
    for file in (out, folder / "report.json", *drawn):
        output.note(f"wrote {file}")
    if not drawn:
        output.note("pictures of the search need matplotlib: pip install 'lora-merge[plot]'")


def search_view(result: "SearchResult") -> "list[RenderableType]":
    """Held-out scores, the best trials, and what mattered."""
    from lora_merge.cli.shared.output import percent
    from lora_merge.cli.shared.table import table
    from lora_merge.evaluation.rows import ALL

    tasks = [task for task in result.held_out["base"] if task != ALL][:6]
    share = result.higher and result.metric in ("accuracy", "exact-match")

    def cells(scores: dict[str, float]) -> list[str]:
        values = [scores[task] for task in (*tasks, ALL)]
        return [percent(value) if share else f"{value:.4g}" for value in values]

    held = table(f"held out: {result.metric}", *tasks, "mean")
    for name, scores in result.held_out.items():
        held.add_row(name, *cells(scores))
    failed = sum(bool(trial.failed) for trial in result.trials)
    tried = f"{len(result.trials)} trials, {failed} that could not be merged"
    shown: list[RenderableType] = [held, tried if failed else f"{len(result.trials)} trials"]
    values = table(f"trial {result.best.number}, the winner", "value", "mattered")
    for name, value in result.best.values.items():
        said = f"{value:.4g}" if isinstance(value, float) else str(value)
        values.add_row(_said(name, result), said, percent(result.mattered.get(name)))
    return [*shown, values]


def _said(name: str, result: "SearchResult") -> str:
    """A value's name, with the adapter's for its number."""
    head, _, rest = name.partition(".")
    number, _, more = rest.partition(".")
    if head not in ("weight", "keep") or not number.isdigit():
        return name
    adapter = result.recipe.adapters[int(number)].adapter
    return " ".join(filter(None, (head, adapter, more)))
