"""The page of `lora-merge report`: what it holds, and what it does in a browser."""

import json
import re
import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from browser import dump_dom, needs_chromium
from builders import SHAPES, adapter_parts, make_adapter, save_adapter, save_parts
from lora_merge.adapters.measured.spectra import adapter_spectra
from lora_merge.analysis.compare import compare
from lora_merge.analysis.report.document import ReportDocument, report_document
from lora_merge.analysis.report.page import page
from lora_merge.cli.app import cli
from lora_merge.errors import OutputError
from lora_merge.files.pages.html_page import write_html
from lora_merge.ranks.choose import choose_ranks

EVIL = "</script><img src=x onerror=alert(1)> & 'q'"
UNEVEN = {"rank_pattern": {"up_proj": 7}, "alpha_pattern": {"up_proj": 3}}


def document_of(count: int = 3, *, names: list[str] | None = None, **parts) -> ReportDocument:
    names = names or ["one", "two", "three"][:count]
    adapters = [make_adapter(n, seed=i, **parts) for i, n in enumerate(names)]
    spectra = [adapter_spectra(a) for a in adapters]
    return report_document(spectra, compare(adapters, per_module=True) if count > 1 else None)


def embedded(text: str) -> dict:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)
    return json.loads(found[1])


def test_the_page_holds_the_numbers_of_spectra_and_compare():
    adapters = [make_adapter(n, seed=i) for i, n in enumerate("abc")]
    spectra, comparison = [adapter_spectra(a) for a in adapters], compare(adapters, per_module=True)
    data = embedded(page(report_document(spectra, comparison)))
    assert [m["name"] for m in data["modules"]] == sorted(SHAPES)
    for one, shown in zip(spectra, data["adapters"], strict=True):
        for name, values in zip(sorted(SHAPES), shown["values"], strict=True):
            assert values == pytest.approx(one.by_module[name].tolist(), rel=1e-5)
    assert data["pairs"]["cosine"][0][2] == pytest.approx(
        float(comparison.total.cosine[0, 2]), rel=1e-3
    )
    first = comparison.whole_modules[sorted(SHAPES)[0]]
    assert data["pairs"]["modules"]["cosine"]["0,2"][0] == pytest.approx(
        float(first.cosine[0, 2]), rel=1e-2
    )


def test_names_are_escaped_wherever_they_stand():
    text = page(document_of(2, names=[EVIL, "b"]))
    assert EVIL not in text and "<img" not in text
    assert text.count("</script>") == 2
    assert embedded(text)["adapters"][0]["name"] == EVIL


def test_nothing_is_asked_of_a_network():
    text = page(document_of())
    assert "default-src 'none'" in text
    assert not re.search(
        r"""(src|href)\s*=|@import|url\(|fetch\(|XMLHttp""", text.split('id="data"')[0]
    )


def test_what_a_warning_says_to_do_can_be_done(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config, tensors = adapter_parts(seed=1)
    save_parts(Path("a"), config, tensors)
    turned = {n: -t if "lora_B" in n and "layers.0.mlp" not in n else t for n, t in tensors.items()}
    save_parts(Path("it's b"), config, turned)
    save_parts(Path("c"), config, tensors)
    arguments = ["report", "a", "it's b", "c", "--json"]
    result = CliRunner().invoke(cli, arguments, catch_exceptions=False)
    remedies = {w["text"].split(":")[0]: w["remedy"] for w in json.loads(result.stdout)["warnings"]}
    assert remedies["a / c"] == "leave one of them out"
    program, *rest = shlex.split(remedies["a / it's b"])
    assert program == "lora-merge" and rest[:3] == ["merge", "a", "it's b"]
    assert CliRunner().invoke(cli, rest, catch_exceptions=False).exit_code == 0


def test_equal_input_gives_equal_bytes_and_nothing_foreign_is_replaced(tmp_path):
    document, target = document_of(), tmp_path / "r.html"
    size = write_html(page(document), target)
    first = target.read_bytes()
    write_html(page(document), target)
    assert target.read_bytes() == first and len(first) == size < 4e6
    foreign = tmp_path / "mine.html"
    foreign.write_text("mine")
    result = CliRunner().invoke(
        cli, ["report", str(save_adapter(tmp_path / "a")), "-o", str(foreign)]
    )
    assert isinstance(result.exception, OutputError) and foreign.read_text() == "mine"


def test_the_command_writes_a_page_and_says_so(tmp_path):
    adapters = [str(save_adapter(tmp_path / n, seed=i)) for i, n in enumerate("ab")]
    out = tmp_path / "r.html"
    result = CliRunner().invoke(cli, ["report", *adapters, "-o", str(out)], catch_exceptions=False)
    assert result.exit_code == 0 and f"wrote {out}: " in result.stdout
    result = CliRunner().invoke(cli, ["report", adapters[0], "-o", str(out), "--json"])
    assert json.loads(result.stdout)["bytes"] == out.stat().st_size
    assert "Interference" not in out.read_text()  # one adapter has no pairs


def test_a_broken_module_is_a_warning(tmp_path):
    folder = save_adapter(tmp_path / "a")
    tensors = load_file(folder / "adapter_model.safetensors")
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    out = tmp_path / "r.html"
    result = CliRunner().invoke(cli, ["report", str(folder), "-o", str(out), "--json"])
    warning = json.loads(result.stdout)["warnings"][0]
    assert "NaN" in warning["text"] and "leave this adapter out" in warning["remedy"]


_DRIVER = Path(__file__).with_name("report_driver.js").read_text()
_LISTEN = """<script>window.problems = [];
addEventListener("error", (e) => problems.push(e.message));
addEventListener("securitypolicyviolation", (e) => problems.push(e.violatedDirective));
for (const name of ["error", "warn"]) console[name] = (...a) => problems.push(a.join(" "));
</script>"""


def in_browser(text: str, folder: Path) -> dict:
    """What the driver saw in headless Chromium."""
    file = folder / "driven.html"
    text = text.replace("<body>", f"<body>{_LISTEN}").replace(
        "</body>", f"<script>{{{_DRIVER}}}</script></body>"
    )
    file.write_text(text, encoding="utf-8")
    shown = dump_dom(file, "--window-size=700,900")
    found = re.search(r"<pre>(.*?)</pre>", shown, re.S)
    assert found, shown[-2000:]
    return json.loads(found[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))


@needs_chromium
def test_in_chromium_by_slider_and_keyboard(tmp_path):
    """The slider's numbers are those of `choose_ranks`; keys do what a pointer does."""
    adapters = [make_adapter(n, seed=i, r=5, **UNEVEN) for i, n in enumerate(["a b", "c", EVIL])]
    spectra = [adapter_spectra(a) for a in adapters]
    document = report_document(spectra, compare(adapters, per_module=True))
    seen = in_browser(page(document), tmp_path)
    assert seen["errors"] == [] and seen["requests"] == [] and seen["hidden"] == 0
    assert not seen["wide"] and seen["unnamed"] == 0
    one = spectra[0]
    assert [row[0] for row in seen["ranks"]] == list(range(1, 8))
    rules = [(row, f"{row[0]}") for row in seen["ranks"]]
    rules += [(row, f"energy:{row[0] / 100}") for row in seen["energies"]]
    for (value, energy, parameters, command), rule in rules:
        plan = choose_ranks(one.by_module, one.costs, rule, before=one.ranks)
        assert energy == pytest.approx(plan.energy, abs=1e-5), rule
        assert parameters == plan.parameters, rule
        option = f"--energy {value / 100:g}" if ":" in rule else f"--rank {value}"
        assert command == f"lora-merge resize 'a b' {option} -o small"
    assert seen["cursor"].startswith("2: a b ") and seen["scaled"]
    assert seen["focus"] == "0,1" and "model.layers.1.mlp.up_proj" in seen["said"]
    assert seen["module"] == "model.layers.1.mlp.up_proj"
    assert seen["pair"].endswith("by layer and module")
