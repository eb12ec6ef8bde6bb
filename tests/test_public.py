"""The public face: names, signatures, examples that run, errors that say what was meant."""

import ast
import doctest
import inspect
import json
import pickle
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

import lora_merge
from builders import make_adapter
from lora_merge.errors import AlignmentError, LoraMergeError, MethodError
from lora_merge.merge.recipe.recipe import Recipe
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
    for name in lora_merge._DEPRECATED:
        assert f"`{name}`" in page, name
        with pytest.warns(DeprecationWarning, match=r"use lora_merge\."):
            assert getattr(lora_merge, name) is not None


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


def reports(tmp: Path) -> Iterator[Printed]:
    here = [str(path) for path in sorted((ROOT / "examples" / "adapters").iterdir())]
    yield lora_merge.open_adapter(here[0])
    yield lora_merge.info(here[0])
    yield lora_merge.spectra(here[0])
    yield lora_merge.compare(here)
    yield lora_merge.choose_ranks(here[0])
    yield lora_merge.Mixture(here)
    merged = lora_merge.merge(here, rank=8)
    yield from (merged, merged.report)
    resized = lora_merge.resize(here[0], 4, tmp / "small")
    yield from (resized, resized.report)


def test_results_print_as_a_few_lines(tmp_path: Path) -> None:
    for result in reports(tmp_path):
        lines = repr(result).splitlines()
        assert 2 <= len(lines) <= 20 and max(map(len, lines)) < 250, repr(result)
        assert result._repr_html_().startswith("<table>")
        if isinstance(result, Report):
            json.dumps(result.to_dict(), allow_nan=False)
            rows = result.rows()
            assert rows and all(row.keys() == rows[0].keys() for row in rows)


def test_html_is_escaped() -> None:
    evil = make_adapter("<script>x</script>", base_model_name_or_path="<img src=x>")
    for printed in (evil, lora_merge.info(evil), lora_merge.spectra(evil)):
        html = printed._repr_html_()
        assert "<script>" not in html and "<img" not in html


def test_a_frame_needs_pandas(monkeypatch: pytest.MonkeyPatch) -> None:
    report = lora_merge.info(make_adapter())
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(LoraMergeError, match="pip install pandas"):
        report.to_frame()


def test_a_frame_has_a_row_per_module() -> None:
    pandas = pytest.importorskip("pandas")
    adapter = make_adapter()
    frame = lora_merge.spectra(adapter).to_frame()
    assert isinstance(frame, pandas.DataFrame)
    assert list(frame["name"]) == list(adapter.modules)


def test_the_version_is_said_once() -> None:
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {lora_merge.__version__}\n" in citation


def test_every_import_is_declared() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    wanted = [*project["dependencies"], *(one for extra in extras for one in extra)]
    names = {re.split(r"[<>=\[; ]", one)[0].lower().replace("-", "_") for one in wanted}
    names |= {"lora_merge", "sklearn", "yaml", "pandas", *sys.stdlib_module_names}
    for path in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            found = []
            if isinstance(node, ast.Import):
                found = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                found = [node.module or ""]
            for module in found:
                assert module.split(".")[0] in names, f"{path}: {module} is not declared"
