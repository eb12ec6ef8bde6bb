"""The usage of a mixture as a page: mean weights by place, and by the row's expert."""

from collections.abc import Iterable, Sequence
from html import escape

from torch import Tensor

from lora_merge.adapters.module_names import kind_of, layer_of, natural
from lora_merge.files.pages.html_page import Cell, html_page, html_table
from lora_merge.mixture.insight.usage import Usage

_FOOTER = (
    "Mean weights over all tokens but padding; of a gate of ranks, means over an expert's units. "
    "Entropy: of the weights' shares, over the largest possible: 0 one expert, 1 all alike."
)


def usage_page(usage: Usage) -> str:
    """The page as HTML; needs no script."""
    parts = [_labels(usage)] if usage.labels else []
    keys = (("layer", layer_of), ("kind of module", kind_of), ("module", str))
    for title, key in keys:
        weights, entropies = usage.by(key), usage.entropies(key)
        most = _largest(weights.values())
        rows: list[Sequence[Cell | str]] = [
            (
                name,
                *_heat(weights[name], most),
                f"{entropies[name]:.2f}",
            )
            for name in natural(weights)
        ]
        table = html_table((title, *usage.experts, "entropy"), rows)
        parts.append(f"<section><h2>By {escape(title)}</h2>\n{table}</section>\n")
    lead = usage.summary().title
    return html_page("Which expert speaks where", lead, "".join(parts), footer=_FOOTER)


def _labels(usage: Usage) -> str:
    means = {name: one.by(lambda _: "all")["all"] for name, one in usage.labels.items()}
    most = _largest(means.values())
    rows: list[Sequence[Cell | str]] = [
        (f"text of {name}", *_heat(weights, most)) for name, weights in means.items()
    ]
    table = html_table(("rows", *usage.experts), rows)
    return f"<section><h2>By the row's expert</h2>\n{table}</section>\n"


def _largest(rows: Iterable[Tensor]) -> float:
    return max((float(row.abs().max()) for row in rows), default=1.0) or 1.0


def _heat(weights: Tensor, most: float) -> list[Cell]:
    return [Cell(f"{w:.3f}", heat=abs(w) / most) for w in weights.tolist()]
