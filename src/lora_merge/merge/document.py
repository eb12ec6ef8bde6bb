"""The table of methods as Markdown and the recipe's JSON schema: docs/ holds what these return."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lora_merge.merge.methods.method import Method
from lora_merge.merge.methods.registry import METHODS
from lora_merge.merge.recipe.recipe import Recipe, Semantics
from lora_merge.options import Parameter, describe_options

_HEAD = """# Merge methods

A merge is *space x combiner x compression*: where the adapters are compared, how N tensors become
one, and what rank comes out. Every row below fixes the three; all share one set of semantics.

`lora-merge merge A B C -M METHOD --rank K -p NAME=VALUE`, or in a recipe `merge_method`, `rank`,
`parameters`. This page is made from the table that also checks parameters
(`lora-merge methods`), so it cannot disagree with it.

**Spaces.** *units*: the rank-one units as they are (sums are concatenations). *core*: orthonormal
coordinates of all columns and rows, where each adapter is a small matrix and everything that
commutes with rotations is exact. *aligned*: the left coordinates alone (KnOTS). *delta*: entry by
entry, in row blocks; no whole delta is formed. *factors*: A and B apart; the result depends on how
a delta is factored, which for one and the same adapter is arbitrary.

**Ranks.** `--rank` takes a number, `energy:0.95`, `elbow`, `budget:x0.5`, `budget:100000` or
`full`. The best approximation is cut (for `wudi`, in its own metric). The report says how much of
the result's energy was kept; under 50 % it warns, and with `--strict` it fails. `full` keeps all
there is: R units, or, for elementwise methods in delta space, whose results have full rank, as many
as the smaller side of the matrix. Rules see the whole result there, too, which needs a full SVD of
every module; in the other spaces results stay within R units.

**Weights** multiply an adapter's delta. A weight is a number, a list over the layers, or a list of
`{filter, value}`. Weight 0 is the same as absent; a module that only some adapters have is merged
from those.

**Which one.** `auto` says why it chose. For adapters of five different tasks least squares on the
output side (`wudi-iso`, or `wudi` with `side=output ridge=0.01`) was the best without data. A sum
of many tasks is mostly too much: scales of 0.6 to 0.7 were best there. Weights chosen on held-out
data, by layer best, gave more than the choice between leading methods
(`benchmarks/results/quality.md`).

**Parameters of single adapters.** What says how an adapter is made sparse (`density`; `trim`,
`epsilon`, `gamma` where the method has them) may be given as a weight is, and for one adapter
alone: `parameters: {density: 0.3}` beside it in a recipe, `--density` or `-p density=...` once per
adapter on the command line, `own_parameters=[{"density": 0.3}, {}]` in Python.

**Random masks** (DARE, DELLA) follow from the seed, the module and what the adapter stores there:
the same for any order, path or name of the adapters, and different for copies of one.

**Not here.** SVD with CUR (Lu et al., Findings of ACL 2026, 261): what is public of it gives no
formula. Methods that train (LoRA.rar, ZipLoRA, AdaMerging) are not merges of files; what they tune
`lora-merge search` tunes.
"""


def methods_page() -> str:
    """docs/methods.md."""
    parts = [_HEAD, "## What all methods share\n", _options_table(describe_options(Semantics))]
    parts.append("## Overview\n")
    parts.append("| method | space | rank | what it does |\n| --- | --- | --- | --- |")
    parts += [
        f"| [`{m.name}`](#{m.name}) | {m.space} | {m.rank} | {m.summary} |"
        for m in METHODS.values()
    ]
    parts.append("")
    parts += [_section(method) for method in METHODS.values()]
    return "\n".join(parts)


def recipe_schema() -> dict[str, Any]:
    """docs/recipe.schema.json, for editors that check and complete recipes."""
    from pydantic import TypeAdapter

    schema = TypeAdapter(Recipe).json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = "lora-merge recipe"
    return schema


def _section(method: Method) -> str:
    facts = [
        f"Source: {method.paper}.",
        f"Spaces: {', '.join(method.spaces or (method.space,))}.",
        f"Cost per module: {method.cost}.",
        "Depends on the deltas alone."
        if method.gauge_free
        else "Depends on how deltas are factored.",
    ]
    if method.ordered:
        facts.append("The order of the two adapters matters.")
    if method.aliases:
        facts.append(f"Also called {', '.join(f'`{alias}`' for alias in method.aliases)}.")
    if method.per_adapter:
        names = " and ".join(f"`{name}`" for name in method.per_adapter)
        facts.append(f"{names} may differ by adapter, layer and name.")
    if method.needs:
        facts.append(f"Needs {method.needs}.")
    lines = [f"### {method.name}\n", f"{method.summary[0].upper()}{method.summary[1:]}.\n"]
    lines.append(" ".join(facts) + "\n")
    if method.parameters():
        lines.append(_options_table(method.parameters()))
    return "\n".join(lines)


def _options_table(parameters: Sequence[Parameter]) -> str:
    rows = ["| parameter | default | values | what it does |", "| --- | --- | --- | --- |"]
    for p in parameters:
        values = f"{p.kind}{', ' if p.limits else ''}{p.limits}".replace("|", "\\|")
        default = "the method's" if p.default is None else str(p.default)
        rows.append(f"| `{p.name}` | {default} | {values} | {p.about} |")
    return "\n".join(rows) + "\n"


def main() -> None:
    """Write both documents below docs/ in the current directory."""
    docs = Path("docs")
    docs.mkdir(exist_ok=True)
    (docs / "methods.md").write_text(methods_page(), encoding="utf-8")
    text = json.dumps(recipe_schema(), indent=2) + "\n"
    (docs / "recipe.schema.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
