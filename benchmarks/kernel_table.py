"""Write the table of numbers in docs/kernels.md from the files in benchmarks/results/.

python benchmarks/kernel_table.py
"""

import json
from pathlib import Path
from typing import Any

from kernel_cases import CASES, Case

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "kernels.md"
RESULTS = ROOT / "benchmarks" / "results"
START, END = "<!-- numbers: benchmarks/kernel_table.py -->\n", "<!-- end of numbers -->\n"


def documents(folder: Path = RESULTS) -> list[dict[str, Any]]:
    """Result files of real shapes, by name; tiny shapes only try the harness."""
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("kernels-*.json"))]
    return [document for document in found if not document["small"]]


def table(found: list[dict[str, Any]]) -> str:
    """The numbers as Markdown: one row per case, one column per device."""
    titles = [_title(document) for document in found]
    lines = [f"| case | aim | {' | '.join(titles) or 'measured'} |"]
    lines.append("| --- " * (2 + max(1, len(found))) + "|")
    for case in CASES:
        cells = [_cell(case, document) for document in found] or ["not measured"]
        sign = "≥" if case.faster else "≤"
        lines.append(f"| {case.title} | {sign} {case.aim:g} | {' | '.join(cells)} |")
    lines.append("")
    if not any(document["device"] not in ("cpu", "mps") for document in found):
        lines.append("**No number here was measured on a GPU yet.**")
    for document in found:
        versions = ", ".join(f"{name} {v}" for name, v in document["versions"].items())
        if document.get("commit"):
            versions += f", at commit {document['commit']}"
        cores = f", {document['cores']} core(s)" if document["cores"] else ""
        lines.append(
            f"{_title(document)}: {document['dtype']}{cores}, medians of "
            f"{_rounds(document)} rounds; {versions}."
        )
    return "\n".join(lines) + "\n"


def _title(document: dict[str, Any]) -> str:
    layers = document["layers"]
    return document["device"] + ("" if layers == 32 else f", {layers} layer(s)")


def _cell(case: Case, document: dict[str, Any]) -> str:
    """Every candidate's ratio, the best first, with its spread and its share of the ceiling.

    The ceiling is the base without adapters, the unit of vLLM and SGLang.
    """
    rows = [row for row in document["rows"] if row["case"]["name"] == case.name]
    if not rows:
        return "not measured"
    ratios = {n: r for n, r in rows[0].get("ratios", {}).items() if n.split()[0] != "base"}
    errors = rows[0].get("errors", {})
    failed = [f"{name} failed" for name in errors]
    order = sorted(ratios, key=ratios.__getitem__, reverse=case.faster)
    shown = [f"{name} {ratios[name]:.2f}" for name in order]
    if shown:
        seconds = rows[0]["seconds"][order[0]]
        spread = (seconds["high"] - seconds["low"]) / seconds["median"] / 2
        ceiling = case.kind in ("decode", "prefill", "generate") and not case.faster
        share = f" ({100 / ratios[order[0]]:.0f} % of the ceiling)" if ceiling else ""
        shown[0] = f"**{shown[0]}** ± {100 * spread:.0f} %{share}"
    return ", ".join(shown + failed)


def _rounds(document: dict[str, Any]) -> str:
    counts = {t["rounds"] for row in document["rows"] for t in row.get("seconds", {}).values()}
    return " or ".join(map(str, sorted(counts)))


def page(text: str, found: list[dict[str, Any]]) -> str:
    """The page with its table made anew."""
    head, _, rest = text.partition(START)
    _, _, tail = rest.partition(END)
    return head + START + table(found) + END + tail


def main() -> None:
    PAGE.write_text(page(PAGE.read_text(), documents()))
    print(PAGE)


if __name__ == "__main__":
    main()
