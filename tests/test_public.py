"""The public face: names, signatures, examples that run, errors that say what was meant."""

import ast
import doctest
import importlib
import inspect
import json
import pickle
import pkgutil
import re
import runpy
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

import lora_merge
from builders import make_adapter
from lora_merge.api.tuning import KernelCheck
from lora_merge.errors import AlignmentError, LoraMergeError, MethodError
from lora_merge.kernels.gated_stack.gpu.compile_check import Compiled
from lora_merge.merge.recipe.recipe import Recipe
from lora_merge.planning import Plan
from lora_merge.printing import Printed, Report

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
FUNCTIONS = [
    name
    for name in lora_merge.__all__
    if name == "merge" or inspect.isfunction(getattr(lora_merge, name))
]
COMMANDS = {"run": "run_recipe", "gate": "Mixture"}  # the others' functions have their names
OF_THE_SHELL = {"completion", "doctor"}  # about the command line and the machine themselves


def function(name: str) -> Any:
    if name == "merge":
        from lora_merge.merge.api import merge

        return merge
    return getattr(lora_merge, name)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_examples_in_docstrings_run(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")  # what they write goes elsewhere
    monkeypatch.chdir(tmp_path)
    tests = doctest.DocTestFinder(recurse=False).find(inspect.unwrap(function(name)), name)
    assert [t for t in tests if t.examples], f"{name} has no example"
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    said: list[str] = []
    for test in tests:
        runner.run(test, out=said.append)
    assert not runner.failures, "".join(said)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_docstrings_name_every_argument(name: str) -> None:
    said = inspect.getdoc(function(name)) or ""
    for argument in inspect.signature(function(name)).parameters:
        assert re.search(rf"^    {argument}: ", said, re.M), argument


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_wrong_keyword_names_function_and_word(name: str) -> None:
    known = [n for n in inspect.signature(function(name)).parameters if len(n) > 3]
    wrong = known[-1] + "s_" if known else "nothing"
    with pytest.raises(TypeError, match=rf"^{name}\(\) has no argument '{wrong}'") as caught:
        getattr(lora_merge, name)(**{wrong: 1})
    assert isinstance(caught.value, LoraMergeError)
    if known and name not in ("cluster", "merge"):  # those have hints of their own
        assert f"did you mean {known[-1]!r}?" in str(caught.value)


def test_the_signature_is_the_real_one() -> None:
    signature = inspect.signature(lora_merge.merge)
    assert signature == inspect.signature(function("merge"))
    assert lora_merge.merge.__doc__ == function("merge").__doc__
    assert {"adapters", "method", "weights", "parameters"} <= set(signature.parameters)
    for name in FUNCTIONS:
        kinds = {p.kind for p in inspect.signature(getattr(lora_merge, name)).parameters.values()}
        assert not kinds & {inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL}


def test_merge_has_every_field_of_a_recipe_with_its_default() -> None:
    parameters = inspect.signature(lora_merge.merge).parameters
    renamed = {"merge_method": "method"}
    for spec in fields(Recipe):
        # A recipe file without a scale means 1 for ever; a call may let it be chosen.
        if spec.name in ("version", "adapters", "merge_method", "parameters", "scale"):
            continue
        name = renamed.get(spec.name, spec.name)
        assert name in parameters, f"merge() needs the argument {name}"
        assert parameters[name].default == spec.default, name


def test_a_methods_parameter_is_told_where_it_belongs() -> None:
    with pytest.raises(TypeError, match=r"a parameter of .*ties.*: parameters=\{'density': 0.3\}"):
        lora_merge.merge("a", density=0.3)
    with pytest.raises(TypeError, match=r"options=LegoOptions\(units='normalized'\)"):
        lora_merge.cluster("a", 4, units="normalized")
    here = str(ROOT / "examples/adapters/upper")
    with pytest.raises(MethodError, match="did you mean 'ties'"):
        lora_merge.merge(here, method="tiess")
    with pytest.raises(MethodError, match="did you mean 'arrow'"):
        lora_merge.Mixture(here, "arow")
    with pytest.raises(MethodError, match="did you mean 'top_k'"):
        lora_merge.Mixture(here, "arrow", topk=1)


def test_every_command_has_a_public_name() -> None:
    from lora_merge.cli.app import _COMMANDS

    for command in set(_COMMANDS) - OF_THE_SHELL:
        assert COMMANDS.get(command, command) in lora_merge.__all__, command


def test_the_page_of_the_api_lists_every_name() -> None:
    page = (ROOT / "docs" / "api.md").read_text()
    for name in lora_merge.__all__:
        assert f"`{name}`" in page, name


def test_the_type_checker_knows_every_name() -> None:
    """The names for type checkers and those at run time are the same, from the same modules."""
    tree = ast.parse(Path(lora_merge.__file__).read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {
        alias.asname: node.module
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert set(seen) == set(lora_merge.__all__) - {"__version__"}
    for name, module in lora_merge._PUBLIC.items():
        assert seen[name] == module


def test_a_type_checker_accepts_the_example_and_finds_a_wrong_keyword(tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.py"
    wrong.write_text(
        "import lora_merge\n"
        "made = lora_merge.merge('a', method='ties')\n"
        "made.report.total()\n"
        "lora_merge.merge('a', densty=0.3)\n"
        "lora_merge.resize('a', 4, rank=3)\n"
    )
    command = [sys.executable, "-m", "mypy", "--strict", ROOT / "examples" / "public_api.py", wrong]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    faults = [line for line in done.stdout.splitlines() if ": error:" in line]
    assert len(faults) == 2, done.stdout + done.stderr
    assert 'wrong.py:4: error: Unexpected keyword argument "densty"' in faults[0]
    assert 'wrong.py:5: error: Unexpected keyword argument "rank"' in faults[1]


def test_the_example_calls_every_function(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = ROOT / "examples" / "public_api.py"
    for name in FUNCTIONS:
        assert f"lora_merge.{name}(" in script.read_text(), name
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(script), run_name="__main__")
    assert "every public function was called" in capsys.readouterr().out


def test_errors_say_the_remedy_once_and_survive_a_pickle() -> None:
    error = MethodError("this is wrong", "do that")
    assert str(error) == "this is wrong\n  try: do that"
    assert str(MethodError("this is wrong")) == "this is wrong"
    for one in (error, AlignmentError(["a", "b"], "do that")):
        again = pickle.loads(pickle.dumps(one))
        assert (str(again), again.remedy) == (str(one), one.remedy)


def classes_of_results() -> set[type]:
    """Every class that prints as a summary, wherever it is in the house."""
    for found in pkgutil.walk_packages(lora_merge.__path__, "lora_merge."):
        if "_triton" not in found.name and found.name != "lora_merge.__main__":
            importlib.import_module(found.name)
    kinds, found = {Report, Plan}, {Printed}
    while new := {sub for kind in found for sub in kind.__subclasses__()} - found:
        found |= new
    return found - kinds - {Printed}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[Printed]:
    """One of every class of results, from the bundled adapters and their tiny base."""
    tmp, examples = tmp_path_factory.mktemp("results"), ROOT / "examples"
    here = [str(path) for path in sorted((examples / "adapters").iterdir())]
    base, rows = str(examples / "base"), str(examples / "data" / "test.jsonl")
    one, start = here[0], {"merge_method": "svd", "adapters": here, "rank": 8}
    mixture = lora_merge.Mixture(here)
    spectra, comparison = lora_merge.spectra(one), lora_merge.compare(here)
    merged = lora_merge.merge(here, rank=8)
    fused = lora_merge.fuse(one, base, tmp / "tuned")
    seen = lora_merge.usage(mixture, base, rows)
    known = lora_merge.describe(mixture, base, rows)
    return [
        *(lora_merge.open_adapter(one), lora_merge.info(one), spectra, comparison),
        *(lora_merge.judge(comparison), lora_merge.choose_ranks(one), mixture, merged),
        *(lora_merge.report(here, tmp / "page.html"), merged.report, fused, seen),
        lora_merge.spectra_beside_base(one, base),
        *(lora_merge.plan_merge(here, rank=8), lora_merge.plan_resize(one, 4)),
        *(lora_merge.plan_compare(here), lora_merge.neighbours(here, count=1)),
        *(lora_merge.resize(one, 4).report, lora_merge.plan_convert(one)),
        *(lora_merge.convert(one).report, lora_merge.plan_fuse(one, base)),
        lora_merge.plan_extract(base, tmp / "tuned", 8),
        lora_merge.extract(base, tmp / "tuned", 8).report,
        lora_merge.run_shard(start, tmp / "parts", "1/2"),
        lora_merge.arrive(here, tmp / "slots", slots=2),
        lora_merge.pack(here, tmp / "library"),
        lora_merge.consolidate(mixture, seen, experts=2),
        KernelCheck("3.9", (80,), (Compiled("gate", 80, "x", "no room"), Compiled("up", 80, "x"))),
        lora_merge.novelty(known, base, rows),
        lora_merge.export(mixture, tmp / "static", "static"),
        lora_merge.evaluate(one, base=base, data=rows, metric="loss", cache=False),
        lora_merge.search({**start, "scale": 0.5}, base=base, data=rows, metric="loss", trials=2),
        lora_merge.soup(here, base=base, data=rows, metric="loss"),
        lora_merge.sweep({**start, "scale": 0.5}, tmp / "sweep", count=2),
    ]


def test_every_class_of_results_is_tested_here(results: list[Printed]) -> None:
    assert classes_of_results() == {type(result) for result in results}


def test_results_print_as_a_few_lines(results: list[Printed]) -> None:
    for result in results:
        lines = repr(result).splitlines()
        assert 2 <= len(lines) <= 20 and max(map(len, lines)) < 250, repr(result)
        assert result._repr_html_().startswith("<table>")


def test_reports_are_documents_and_tables(results: list[Printed]) -> None:
    for result in results:
        if isinstance(result, Report):
            json.dumps(result.to_dict(), allow_nan=False)
            rows = result.rows()
            assert all(row.keys() == rows[0].keys() for row in rows), type(result)
            json.dumps(rows)  # plain values


def test_reports_are_frames(results: list[Printed]) -> None:
    pandas = pytest.importorskip("pandas")
    for result in results:
        if isinstance(result, Report):
            frame = result.to_frame()
            assert isinstance(frame, pandas.DataFrame)
            assert len(frame) == len(result.rows())


def test_html_is_escaped() -> None:
    evil = make_adapter("<script>x</script>", base_model_name_or_path="<img src=x>")
    for printed in (evil, lora_merge.info(evil), lora_merge.spectra(evil)):
        html = printed._repr_html_()
        assert "<script>" not in html and "<img" not in html


def test_a_notebook_gets_the_beginning_of_a_long_table() -> None:
    modules = {f"model.layers.{i}.mlp.up_proj": (6, 5) for i in range(60)}
    html = lora_merge.spectra(make_adapter(shapes=modules))._repr_html_()
    assert "60 rows, the first 50; to_frame() has all" in html
    assert html.count("<tr><td>") == 50 and "<td>model.layers.10.mlp.up_proj</td>" in html


def test_a_frame_needs_pandas(monkeypatch: pytest.MonkeyPatch) -> None:
    report = lora_merge.info(make_adapter())
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(LoraMergeError, match="pip install pandas"):
        report.to_frame()


def test_the_version_is_said_once() -> None:
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {lora_merge.__version__}\n" in citation


def test_every_import_is_declared() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    wanted = [*project["dependencies"], *(one for extra in extras for one in extra)]
    names = {re.split(r"[<>=\[; ]", one)[0].lower().replace("-", "_") for one in wanted}
    names |= {"lora_merge", "sklearn", "yaml", "pandas", "pywt", *sys.stdlib_module_names}
    names.add("IPython")  # it is there where a kernel runs, and imported nowhere else
    for path in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            found = []
            if isinstance(node, ast.Import):
                found = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                found = [node.module or ""]
            for module in found:
                assert module.split(".")[0] in names, f"{path}: {module} is not declared"
