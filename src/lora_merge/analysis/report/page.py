"""The page around the data: tables that need no script, then figures that a small one draws.

Drawn by hand, not by plotly: its script alone is 4.8 MB, this one is a few kB.
"""

from html import escape
from importlib.resources import files

from lora_merge.analysis.report.document import ReportDocument, Warning
from lora_merge.analysis.verdicts import MEANING, Verdict
from lora_merge.files.pages.html_page import html_page


def page(document: ReportDocument) -> str:
    """The whole page as HTML; every name in it is escaped."""
    script = files(__package__).joinpath("page.js").read_text("utf-8")
    return html_page(
        f"{', '.join(document.names)}: LoRA report",
        _lead(document),
        f"{_warnings(document.warnings)}{_shrink(document)}{_FIGURES}{_pairs(document)}",
        footer="Singular values are those of scaling · B · A, exact, from the factors. Energy (sum "
        "of squared singular values) stands in for quality: measure the task after resizing or "
        "merging.",
        script=script,
        data=document.data,
    )


_FIGURES = """<noscript>
<p>The figures need the script of this page; the tables do not.</p>
</noscript>
<section id="rank" hidden aria-labelledby="rank-title">
<h2 id="rank-title">What rank to keep</h2><div class="controls"></div>
<output class="readout" aria-live="polite"></output><div class="figure"></div></section>
<section id="spectra" hidden aria-labelledby="spectra-title">
<h2 id="spectra-title">Spectra</h2><div class="controls"></div>
<div class="figure"></div><output class="readout" aria-live="polite"></output>
<details><summary>The values as a table</summary><div class="table"></div></details></section>
<section id="maps" hidden aria-labelledby="maps-title">
<h2 id="maps-title">By layer and module</h2><div class="controls"></div>
<div class="scale"></div><div class="figure maps"></div>
<output class="readout" aria-live="polite"></output></section>
<section id="similar" hidden aria-labelledby="similar-title">
<h2 id="similar-title">How alike they are</h2><div class="controls"></div>
<div class="figure"></div><output class="readout" aria-live="polite"></output>
<div class="map"></div><div class="tree"></div></section>
"""


def _lead(document: ReportDocument) -> str:
    bases = sorted({str(a["base"]) for a in document.data["adapters"] if a["base"]})
    count = len(document.names)
    what = "1 adapter" if count == 1 else f"{count} adapters"
    return f"{what}, {len(document.data['modules'])} modules, for {', '.join(bases) or '?'}"


def _warnings(warnings: tuple[Warning, ...]) -> str:
    if not warnings:
        return "<section><h2>Warnings</h2><p>None.</p></section>\n"
    rows = "".join(
        f"<li>{escape(w.text)}<br><span class=remedy>"
        + (f"<code>{escape(w.remedy)}</code>" if w.command else escape(w.remedy))
        + "</span></li>\n"
        for w in warnings
    )
    return f"<section><h2>Warnings</h2><ul class=warnings>\n{rows}</ul></section>\n"


def _shrink(document: ReportDocument) -> str:
    parts = []
    for name, reference, advice in zip(
        document.names, document.data["adapters"], document.advice, strict=True
    ):
        rows = "".join(
            f"<tr><th scope=row>{escape(o.text)}</th><td>{100 * o.energy:.1f} %</td>"
            f"<td>{100 * o.parameters:.0f} %</td><td class=text><code>lora-merge resize "
            f"{escape(reference['reference'])} {escape(o.flag)} -o small</code></td></tr>\n"
            for o in advice.options
        )
        table = (
            "<div class=scroll><table><thead><tr><th scope=col>keep</th><th scope=col>energy</th>"
            "<th scope=col>parameters</th><th scope=col class=text>command</th></tr></thead>"
            f"<tbody>\n{rows}</tbody></table></div>"
            if rows
            else ""
        )
        parts.append(
            f"<details><summary><b>{escape(name)}</b>: {escape(advice.headline)}</summary>"
            f"{table}</details>\n"
        )
    return f"<section><h2>Ways to shrink</h2>\n{''.join(parts)}</section>\n"


def _pairs(document: ReportDocument) -> str:
    pairs = document.data["pairs"]
    if pairs is None:
        return ""
    heads = (
        ("pair", "text"),
        ("cosine", ""),
        ("inputs, &times; chance", ""),
        ("outputs, &times; chance", ""),
        ("interference, &times; chance", ""),
        ("opposite signs", ""),
        ("norm kept in a sum", ""),
        ("so", "text"),
    )
    head = "".join(f'<th scope=col class="{kind}">{text}</th>' for text, kind in heads)
    body = "".join(_pair_row(v, document.names, pairs) for v in document.verdicts)
    count = len(document.names)
    return (
        "<section><h2>Interference</h2><div class=scroll><table><thead><tr>"
        f"{head}</tr></thead><tbody>\n{body}</tbody></table></div>\n"
        f"<p>Added together, they keep {100 * pairs['set_cancellation']:.0f} % of the sum of their "
        f"norms; unrelated adapters of equal norm would keep {100 / count**0.5:.0f} %.</p>"
        "</section>\n"
    )


def _pair_row(v: Verdict, names: tuple[str, ...], pairs: dict[str, list[list[float]]]) -> str:
    i, j = v.first, v.second
    numbers = (
        f"{v.cosine + 0.0:.3f}",
        f"{pairs['overlap_in'][i][j]:.1f}",
        f"{pairs['overlap_out'][i][j]:.1f}",
        f"{pairs['interference'][i][j]:.1f}",
        f"{100 * pairs['conflict'][i][j]:.0f} %",
        f"{100 * pairs['cancellation'][i][j]:.0f} %",
    )
    cells = "".join(f"<td>{n}</td>" for n in numbers)
    title = f"{names[i]} / {names[j]}"
    return (
        f"<tr><th scope=row>{escape(title)}</th>{cells}"
        f"<td class=text>{escape(MEANING[v.kind])}</td></tr>\n"
    )
