"""What the page shows, as plain data: spectra and measures by module, pairs, warnings."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from shlex import quote
from typing import Any

from lora_merge.adapters.measured.spectra import AdapterSpectra
from lora_merge.adapters.module_names import labels, natural, place_of
from lora_merge.analysis.advice import Advice, advise
from lora_merge.analysis.compare import Comparison
from lora_merge.analysis.families import cluster_adapters, tree_of
from lora_merge.analysis.metrics import LOG_METRICS, METRIC_LABELS, METRICS
from lora_merge.analysis.pairs.matrices import divide
from lora_merge.analysis.verdicts import MEANING, Kind, Verdict, judge
from lora_merge.files.tensor_file import DTYPES
from lora_merge.printing import Report, Summary
from lora_merge.ranks.measures import measure

# Numbers of the maps of single pairs: module by module up to here, beyond it over all modules only.
_MOST_CELLS = 150_000
_REMEDIES: dict[Kind, str] = {
    "conflict": "lora-merge merge {first} {second} -M ties -o merged",
    "entangled": "lora-merge merge {first} {second} -M knots-ties -o merged",
}


@dataclass(frozen=True)
class Warning:
    """Something to know before these adapters are used.

    Attributes:
        text: What it is, and of what.
        remedy: What can be done about it, in words or as a command.
        command: Whether `remedy` is a command line.
    """

    text: str
    remedy: str
    command: bool = False


@dataclass(frozen=True, repr=False)
class ReportDocument(Report):
    """All of the page.

    Attributes:
        names: The adapters' short names.
        references: What a command calls them.
        advice: One per adapter.
        verdicts: One per pair, the most alarming first; empty where nothing was compared.
        warnings: What is wrong, with remedies.
        data: What the page's figures are drawn from, JSON-ready, without NaN.
    """

    names: tuple[str, ...]
    references: tuple[str, ...]
    advice: tuple[Advice, ...]
    verdicts: tuple[Verdict, ...]
    warnings: tuple[Warning, ...]
    data: dict[str, Any]

    def summary(self) -> Summary:
        """The adapters, and what is wrong."""
        facts = [("adapters", ", ".join(self.names[:8]) + (", ..." if self.names[8:] else ""))]
        facts += [("warning", warning.text) for warning in self.warnings[:8]]
        return Summary(f"Page about {len(self.names)} adapters", tuple(facts))

    def rows(self) -> list[dict[str, Any]]:
        """One row per warning."""
        return [asdict(warning) for warning in self.warnings]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: what the figures are drawn from, and the warnings."""
        return {"schema": 1, "warnings": self.rows(), **self.data}


def report_document(
    spectra: Sequence[AdapterSpectra],
    comparison: Comparison | None = None,
    *,
    names: Sequence[str] | None = None,
    notes: Sequence[Sequence[str]] = (),
) -> ReportDocument:
    """Put what was measured together for one page.

    Experts of one module share its rank and are one row here: their i-th energies are added.

    Args:
        spectra: One per adapter.
        comparison: Of the same adapters in the same order; None for one adapter.
        names: Short names, in that order; default: the adapters' own.
        notes: Oddities that were found on opening, one list per adapter.
    """
    references = tuple(s.adapter for s in spectra)
    shown = tuple(names) if names is not None else references
    modules = natural({name for s in spectra for name in s.by_module})
    advice = tuple(advise(s) for s in spectra)
    verdicts = tuple(judge(comparison)) if comparison else ()
    places = {name: place_of(name) for name in modules}
    short = labels(places.values())
    kinds = [short[places[name].stack, places[name].kind] for name in modules]
    data = {
        "schema": 1,
        "modules": [
            {"name": name, "kind": kind, "layer": places[name].layer}
            for name, kind in zip(modules, kinds, strict=True)
        ],
        "metrics": [
            {"key": key, "label": METRIC_LABELS[key], "log": key in LOG_METRICS} for key in METRICS
        ],
        "adapters": [
            {"name": name, "reference": quote(one.adapter), **_adapter(one, modules)}
            for name, one in zip(shown, spectra, strict=True)
        ],
        "pairs": _pairs(comparison, modules) if comparison else None,
    }
    warnings = [
        *_own_warnings(spectra, shown, notes, advice),
        *_pair_warnings(verdicts, shown, references),
    ]
    return ReportDocument(shown, references, advice, verdicts, tuple(warnings), data)


def _adapter(spectra: AdapterSpectra, modules: Sequence[str]) -> dict[str, Any]:
    values, specs, costs = spectra.by_module, spectra.specs, spectra.costs
    measures = {
        name: measure(found, (specs[name].d_out, specs[name].d_in), specs[name].dtype)
        for name, found in values.items()
        if float(found.sum()) > 0
    }
    own = [name if name in values else None for name in modules]
    return {
        "base": spectra.base_model,
        "frobenius": _digits(spectra.frobenius, 6),
        "values": [n and [_digits(v, 6) for v in values[n].tolist()] for n in own],
        "rank": [n and specs[n].rank for n in own],
        "cost": [n and costs[n] for n in own],
        "bytes": [n and DTYPES[specs[n].dtype].itemsize for n in own],
        "shape": [n and [specs[n].d_out, specs[n].d_in, specs[n].num_experts] for n in own],
        "metrics": {
            key: [
                _digits(metric(measures[n]), 4) if n is not None and n in measures else None
                for n in own
            ]
            for key, metric in METRICS.items()
        },
    }


def _pairs(comparison: Comparison, modules: Sequence[str]) -> dict[str, Any]:
    total, count = comparison.total, len(comparison.adapters)
    order = list(tree_of(total.cosine).order) if count > 2 else list(range(count))
    tables = {
        "cosine": total.cosine,
        "interference": divide(total.interference, total.chance_interference),
        "overlap_in": divide(total.overlap_in, total.chance_in),
        "overlap_out": divide(total.overlap_out, total.chance_out),
        "conflict": total.conflict,
        "cancellation": total.cancellation,
    }
    tree = tree_of(total.cosine).to_dict() if count > 2 else None
    return {
        **{
            name: [[_digits(v, 4) for v in row] for row in t.tolist()] for name, t in tables.items()
        },
        "order": order,
        "tree": tree,
        "groups": cluster_adapters(total.cosine) if count > 2 else list(range(count)),
        "set_cancellation": _digits(total.set_cancellation, 4),
        "modules": _by_module(comparison, modules),
    }


def shows_modules(adapters: int, modules: int) -> bool:
    """Whether the page has room for every pair's numbers module by module."""
    return adapters * (adapters - 1) * modules <= _MOST_CELLS


def _by_module(comparison: Comparison, modules: Sequence[str]) -> dict[str, Any] | None:
    """Pair (i, j), i < j, as "i,j" → one number per module of the page; experts together."""
    count = len(comparison.adapters)
    merged = comparison.whole_modules
    if not merged or not shows_modules(count, len(modules)):
        return None
    pairs = [(i, j) for i in range(count) for j in range(i + 1, count)]

    def numbers(table: dict[str, list[list[float]]], i: int, j: int) -> list[float | None]:
        shared = (merged[n].shared[i, j] > 0 if n in merged else False for n in modules)
        return [
            _digits(table[n][i][j], 3) if both else None
            for n, both in zip(modules, shared, strict=True)
        ]

    cosines = {n: m.cosine.tolist() for n, m in merged.items()}
    times = {n: divide(m.interference, m.chance_interference).tolist() for n, m in merged.items()}
    return {
        "cosine": {f"{i},{j}": numbers(cosines, i, j) for i, j in pairs},
        "interference": {f"{i},{j}": numbers(times, i, j) for i, j in pairs},
    }


def _own_warnings(
    spectra: Sequence[AdapterSpectra],
    names: Sequence[str],
    notes: Sequence[Sequence[str]],
    advice: Sequence[Advice],
) -> list[Warning]:
    found = []
    for index, (one, name) in enumerate(zip(spectra, names, strict=True)):
        broken = any(m.status == "not finite" for m in one.modules)
        dead = one.finite and all(m.status in ("zero", "untrained") for m in one.finite)
        for remark in advice[index].remarks:
            remedy, command = "look at these modules before merging", False
            if broken and "NaN or infinite" in remark:
                remedy = "leave this adapter out: its training diverged, or the file is damaged"
            elif dead:
                remedy = "leave this adapter out: it changes nothing"
            elif "numerical rank below r" in remark:
                target = quote(f"{name.replace('/', '-')}-small")
                remedy = f"lora-merge resize {quote(one.adapter)} --energy 1 -o {target}"
                command = True
            elif "no rank stands out" in remark:
                remedy = "do not lower its rank by energy: measure the task instead"
            found.append(Warning(f"{name}: {remark}", remedy, command))
        remarks = notes[index] if index < len(notes) else ()
        found += [
            Warning(f"{name}: {note}", "nothing to do: it is read as said") for note in remarks
        ]
        if one.base_model is None:
            found.append(
                Warning(
                    f"{name}: does not say which base model it belongs to",
                    "give --accept-base-models where it is merged with others, if you know",
                )
            )
    return found


def _pair_warnings(
    verdicts: Sequence[Verdict], names: Sequence[str], references: Sequence[str]
) -> list[Warning]:
    found = []
    for v in verdicts:
        if v.kind not in ("same", "opposite", "conflict", "entangled"):
            continue
        where = f" (most in {', '.join(v.where)})" if v.where else ""
        text = f"{names[v.first]} / {names[v.second]}: {MEANING[v.kind]}{where}"
        command = _REMEDIES.get(v.kind)
        if command:
            first, second = quote(references[v.first]), quote(references[v.second])
            found.append(Warning(text, command.format(first=first, second=second), True))
        else:
            found.append(Warning(text, "leave one of them out"))
    return found


def _digits(value: float, count: int) -> float:
    """A number rounded to significant digits, so that the page stays small."""
    return float(f"{value:.{count}g}") if math.isfinite(value) else 0.0
