"""What people type, and what answers: words, completion, doctor, what was written."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from builders import adapter_parts, make_adapter, save_adapter
from lora_merge.adapters.adapter import build_adapter
from lora_merge.adapters.alignment import align
from lora_merge.adapters.config import parse_config
from lora_merge.cli import app
from lora_merge.cli.app import cli
from lora_merge.cli.commands import doctor
from lora_merge.cli.commands.methods import AUTO
from lora_merge.cli.shared.method_names import METHOD_NAMES
from lora_merge.errors import LoraMergeError, MethodError, SourceError
from lora_merge.files.tensor_file import TensorDict
from lora_merge.merge.auto import method as auto
from lora_merge.merge.methods.other_names import CALLED, SAME
from lora_merge.merge.methods.registry import METHODS, find_method
from lora_merge.ranks.rule import parse_rule


def run(*arguments: object) -> str:
    result = CliRunner().invoke(cli, list(map(str, arguments)), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def complaint(capsys, *arguments: str) -> str:
    assert app.run(list(arguments)) == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (
            "merge a --methd ties",
            "error: no such option '--methd'\n  try: did you mean '--method'?\n",
        ),
        ("mrege", "did you mean 'merge'?"),
        ("gate a --preset X-LoRA", "did you mean 'xlora'?"),
        ("gate a --preset zzz", "choose from: constant, "),
        ("merge a --compat pefd", "did you mean 'peft'?"),
        ("train", "error: missing argument 'MIXTURE'\n  try: lora-merge train --help\n"),
    ],
)
def test_a_wrong_word_is_told_the_nearest_right_one(typed, said, capsys):
    text = complaint(capsys, *typed.split())
    assert said in text and text.startswith("error: ") and text.count("error") == 1


def test_nothing_typed_is_answered_by_help(capsys):
    assert complaint(capsys).startswith("Usage: ")


def test_version_in_short():
    assert run("-V") == run("--version")


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("TIES", "ties"),
        ("average", "mean"),
        ("sum", "cat"),
        ("dare_linear", "dare"),
        ("dare_ties", "dare-ties"),
        ("linear", "svd"),
        ("task_arithmetic", "svd"),
        ("model_stock", "model-stock"),
        ("ties_svd", "ties"),
        ("Magnitude_Prune", "magnitude"),
    ],
)
def test_words_of_other_tools(typed, meant):
    assert find_method(typed) is METHODS[meant]


def test_every_word_leads_to_a_method_and_hides_none():
    assert set(SAME.values()) <= set(METHODS)
    own = {name for m in METHODS.values() for name in (m.name, *m.aliases)}
    assert not own & (set(SAME) | set(CALLED))


def test_words_without_a_method_say_so_in_a_line(tmp_path):
    for word, line in CALLED.items():
        with pytest.raises(MethodError) as caught:
            find_method(word)
        assert line in str(caught.value)
    with pytest.raises(MethodError) as caught:
        find_method("qqqqqqq")
    assert len(str(caught.value)) < 120


def test_a_merge_by_another_tools_word_is_the_same_merge(tmp_path):
    a, b = (save_adapter(tmp_path / n, seed=i) for i, n in enumerate("ab"))
    for word, name in (("average", "mean"), ("mean", "mean")):
        run("merge", a, b, "-M", word, "-o", tmp_path / word)
        assert name in (tmp_path / word / "lora_merge.yaml").read_text() or word == "average"
    one, other = (
        (tmp_path / n / "adapter_model.safetensors").read_bytes() for n in ("average", "mean")
    )
    assert one == other


def test_a_directory_of_adapters_suggests_all_of_them(tmp_path):
    for i, name in enumerate("ab"):
        save_adapter(tmp_path / "all" / name, seed=i)
    with pytest.raises(SourceError) as caught:
        run("merge", tmp_path / "all", "-o", tmp_path / "out")
    assert f"{tmp_path}/all/*" in str(caught.value)
    run("merge", f"{tmp_path}/all/*", "-o", tmp_path / "out")


@pytest.mark.parametrize("written", [True, False])
def test_a_recipe_runs_from_any_directory(written, tmp_path, monkeypatch):
    """Its paths are meant from where it lies, those of one that a merge wrote from above."""
    for i, name in enumerate("ab"):
        save_adapter(tmp_path / "all" / name, seed=i)
    monkeypatch.chdir(tmp_path)
    run("merge", "all/a", "all/b", "-M", "svd", "-o", "out/first")
    recipe = tmp_path / "out" / "first" / "lora_merge.yaml"
    if not written:
        recipe = tmp_path / "all" / "mine.yaml"
        recipe.write_text("merge_method: svd\nadapters: [{adapter: '[ab]'}]\nscale: auto\n")
    for name in ("elsewhere", "out/first"):
        (tmp_path / name).mkdir(exist_ok=True)
        monkeypatch.chdir(tmp_path / name)
        run("run", os.path.relpath(recipe), "-o", tmp_path / "again")
        one, other = (
            (tmp_path / n / "adapter_model.safetensors").read_bytes()
            for n in ("out/first", "again")
        )
        assert one == other
        shutil.rmtree(tmp_path / "again")


def test_a_recipe_names_a_member_of_a_library_beside_it(tmp_path, monkeypatch):
    folders = [save_adapter(tmp_path / n, seed=i) for i, n in enumerate("ab")]
    run("pack", *folders, "-o", tmp_path / "lib")
    (tmp_path / "r.yaml").write_text(
        "merge_method: svd\nadapters: [{adapter: 'lib:a'}, {adapter: b}]\n"
    )
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    run("run", "../r.yaml", "-o", "out")
    assert "../lib:a" in (tmp_path / "elsewhere" / "out" / "lora_merge.yaml").read_text()


def test_a_rank_rule_misspelt():
    with pytest.raises(MethodError, match="did you mean 'energy'"):
        parse_rule("enrgy:0.9")


def test_a_share_without_its_x():
    with pytest.raises(MethodError, match=r"x0\.5"):
        parse_rule("budget:0.5")
    assert parse_rule("budget:x0.5").unit == "share"


@pytest.mark.parametrize(
    ("method", "ignored"),
    [
        ("ties", "gamma=0.1"),
        ("dare", "zero_sign=plus"),
        ("dare", "scope=row"),
        ("breadcrumbs", "rescale=probability"),
        ("sce", "epsilon=0.1"),
    ],
)
def test_parameters_of_other_entrywise_methods_are_refused(method, ignored, tmp_path):
    a, b = (save_adapter(tmp_path / n, seed=i) for i, n in enumerate("ab"))
    with pytest.raises(LoraMergeError, match=ignored.partition("=")[0]):
        run("merge", a, b, "-M", method, "-p", ignored, "-o", tmp_path / "out")


def test_parameters_that_a_method_ignores_are_refused(tmp_path):
    a, b = (save_adapter(tmp_path / n, seed=i) for i, n in enumerate("ab"))
    for method in ("auto", "svd"):
        with pytest.raises(LoraMergeError, match="no parameter 'density'"):
            run("merge", a, b, "-M", method, "-p", "density=0.3", "-o", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def with_factors_of(seed, factor, name):
    """A random adapter with one factor of the adapter of another seed."""
    config, tensors = adapter_parts(seed=ord(name))
    others = adapter_parts(seed=seed)[1]
    tensors.update({n: t for n, t in others.items() if factor in n})
    return build_adapter(name, parse_config(config, name), TensorDict(tensors))


def nearly_alike(name):
    config, tensors = adapter_parts(seed=0)
    noise = adapter_parts(seed=ord(name))[1]
    tensors = {n: t + 0.1 * noise[n] for n, t in tensors.items()}
    return build_adapter(name, parse_config(config, name), TensorDict(tensors))


def test_auto_is_explained_as_it_chooses():
    """Each line of the table on adapters that it speaks of, two of them and three."""
    for count in (2, 3):
        names = "abc"[:count]
        sets = {
            "one adapter": [make_adapter("a")],
            "all share A, or all share B": [with_factors_of(0, "lora_A", n) for n in names],
            "mean cosine of their deltas above 0.5": [nearly_alike(n) for n in names],
            "all others": [make_adapter(n, seed=i) for i, n in enumerate(names)],
        }
        assert {n: auto.choose(align(a)).method for n, a in sets.items()} == AUTO
    text = run("methods", "auto")
    assert all(method in text for method in AUTO.values()) and str(auto._SAME_TASK) in text
    assert max(map(len, text.splitlines())) <= 80
    assert json.loads(run("methods", "auto", "--json"))["name"] == "auto"


def test_commands_that_write_say_what(tmp_path):
    a, b = (save_adapter(tmp_path / n, seed=i) for i, n in enumerate("ab"))
    mix = tmp_path / "mix"
    assert run("gate", a, b, "-o", mix).endswith(f"wrote {mix}\n")
    assert "wrote" not in run("gate", a, b, "-o", tmp_path / "no", "--dry-run")


def test_doctor_is_fit_to_paste(monkeypatch):
    text = run("doctor")
    for said in ("lora-merge ", "torch ", "kernels ", "cache ", "device ", "Python "):
        assert said in text
    monkeypatch.setattr(doctor, "_kernels", lambda: "not asked twice")
    about = json.loads(run("doctor", "--json"))
    assert about["libraries"]["torch"] and about["kernels"] and about["caches"]["scores"]


def test_the_shells_names_are_the_tables():
    assert set(METHOD_NAMES) == {"auto", *METHODS}


def asked(*words: str) -> list[str]:
    """What bash would be offered after `lora-merge WORDS`, the last one incomplete."""
    environment = {
        **os.environ,
        "_LORA_MERGE_COMPLETE": "bash_complete",
        "COMP_WORDS": " ".join(["lora-merge", *words]),
        "COMP_CWORD": str(len(words)),
    }
    command = [sys.executable, "-X", "importtime", "-m", "lora_merge"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert "| torch\n" not in done.stderr.replace(" ", "").replace("|", "| ")
    return done.stdout.split()


def test_completion_of_commands_options_methods_and_paths():
    assert asked("comp") == ["plain,compare", "plain,completion"]
    assert "plain,--method" in asked("merge", "--met")
    assert asked("merge", "-M", "knots") == ["plain,knots-ties", "plain,knots-dare-ties"]
    assert asked("methods", "wudi") == ["plain,wudi", "plain,wudi-iso"]
    assert asked("merge", "some/di") == ["file,some/di"]
    assert asked("merge", "-o", "di")[0].startswith(("file,", "dir,"))


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_is_one_the_shell_can_read(shell, tmp_path):
    script = Path(tmp_path / "script")
    script.write_text(run("completion", shell))
    assert "_LORA_MERGE_COMPLETE" in script.read_text()
    if program := shutil.which(shell):
        subprocess.run([program, "-n", str(script)], check=True)
