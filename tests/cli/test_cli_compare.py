"""`lora-merge compare` as a user sees it."""

import json

import pytest
from click.testing import CliRunner

from builders import SHAPES, adapter_parts, save_adapter, save_parts
from lora_merge.cli.app import cli


def run(*arguments: object) -> str:
    result = CliRunner().invoke(cli, ["compare", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def folders(tmp_path, count: int) -> list:
    return [save_adapter(tmp_path / f"adapter-{i}", seed=i // 2, r=2 + i % 2) for i in range(count)]


@pytest.mark.parametrize(("count", "width"), [(2, 80), (5, 80), (5, 60), (20, 80), (40, 80)])
def test_fits_the_width_and_ends_in_advice(tmp_path, count, width):
    text = run(*folders(tmp_path, count), "--width", width)
    assert max(map(len, text.splitlines())) <= width
    assert "added together they keep" in text
    assert ("average linkage" in text) == (count > 2)


def test_says_what_duplicates_are(tmp_path):
    one = save_adapter(tmp_path / "one")
    two = save_adapter(tmp_path / "two", dtype=__import__("torch").float16)
    text = run(one, two)
    assert "one / two: near-duplicates: keep one" in text


def test_an_untrained_adapter_is_named(tmp_path):
    config, tensors = adapter_parts()
    zero = {key: value * 0 if "lora_B" in key else value for key, value in tensors.items()}
    text = run(save_parts(tmp_path / "zero", config, zero), save_adapter(tmp_path / "one"))
    assert "zero changes nothing, every delta is zero: leave it out" in text
    assert "nan" not in text.lower()


def test_long_names_give_way_to_the_matrix_numbers(tmp_path):
    paths = [save_adapter(tmp_path / f"a-rather-long-adapter-name-{i}", seed=i) for i in range(3)]
    text = run(*paths, "--width", 80)
    assert "1 /  3 " in text and "adapter-name-2" in text


def test_json_and_clusters(tmp_path):
    document = json.loads(
        run(*folders(tmp_path, 4), "--json", "--cluster", 2, "--per-module"),
        parse_constant=lambda name: pytest.fail(name),
    )
    assert len(document["modules"]) == 4 and len(document["verdicts"]) == 6
    assert len(set(document["clusters"])) == 2
    assert len(document["tree"]["merges"]) == 3


def test_wrong_usage(tmp_path):
    result = CliRunner().invoke(cli, ["compare", "a", "b", "--cluster", "many"])
    assert result.exit_code == 2


def test_checkpoints_of_one_run_are_alike(shared):
    document = json.loads(run(shared / "adapters" / "roberta-base" / "*", "--json"))
    assert {v["kind"] for v in document["verdicts"]} == {"same", "agree"}
    tasks = json.loads(run(shared / "arena" / "adapters" / "*", "--json"))
    assert {v["kind"] for v in tasks["verdicts"]} == {"independent"}


@pytest.mark.parametrize(("count", "width"), [(2, 80), (2, 60), (5, 80), (12, 60)])
def test_chosen_modules_show_their_principal_angles(tmp_path, count, width):
    paths = folders(tmp_path, count)
    text = run(*paths, "--module", "1.*", "--width", width)
    assert max(map(len, text.splitlines())) <= width
    assert text.count("principal angles of model.layers.1.") == 2
    assert ("random spaces" in text) == (count == 2)
    document = json.loads(run(*paths, "--module", "1.*", "--json"))
    assert [len(m["angles_in"]) for m in document["modules"]] == [count, count]


def test_adapters_that_share_no_module_have_no_angles(tmp_path):
    names = list(SHAPES)
    one, two = (
        save_adapter(tmp_path / n, shapes={name: SHAPES[name]})
        for n, name in (("one", names[0]), ("two", names[2]))
    )
    text = run(one, two, "--module", "*")
    assert text.count("no two adapters have a space there") == 2
    assert "put together, they do not touch" in " ".join(text.split())


def test_pictures_and_the_page_are_written(tmp_path):
    folders = [save_adapter(tmp_path / n, seed=i) for i, n in enumerate("abc")]
    files = {kind: tmp_path / f"c.{kind}" for kind in ("svg", "png", "html")}
    options = [word for kind, file in files.items() for word in (f"--{kind}", file)]
    run(*folders, *options)
    assert files["svg"].read_text().lstrip().startswith("<?xml")
    assert files["png"].read_bytes().startswith(b"\x89PNG")
    page = files["html"].read_text()
    alone = tmp_path / "r.html"
    done = CliRunner().invoke(cli, ["report", *map(str, folders), "-o", str(alone)])
    assert done.exit_code == 0
    assert page == alone.read_text()
