"""Documents from elsewhere: plain data, or one error that names the file."""

import json
import os
from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from lora_merge.errors import SourceError
from lora_merge.files.documents import read_cache, read_json, read_yaml, validated

PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=8,
)


@given(data=PLAIN)
def test_plain_data_comes_through(data: object, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("documents") / "x"
    path.write_text(json.dumps(data))
    assert read_json(path, "it") == data
    path.write_text(yaml.safe_dump(data))
    assert read_yaml(path, "it") == data


LAUGHS = "a: &a [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{new}: &{new} [{','.join([f'*{old}'] * 10)}]\n" for old, new in pairwise("abcdefgh")
)


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("[" * 100_000, "nested"),
        ("[" * 60 + "]" * 60, "nested"),
        ('{"a": 1e999}', "not finite"),
        ('{"a": NaN}', "not finite"),
        ('{"a": 1' + "0" * 400 + "}", "64 bits"),
        ("1" * 5000, "valid JSON"),
        ('["\\ud800"]', "Unicode"),
        ('{"\\ud800": 1}', "Unicode"),
        ("{", "valid JSON"),
        ("\xff", "valid JSON"),
    ],
)
def test_json_that_is_more_than_plain_data(text: str, word: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(text, encoding="latin-1")
    with pytest.raises(SourceError, match=word) as caught:
        read_json(tmp_path / "x.json", "it")
    assert "x.json" in str(caught.value) and caught.value.remedy


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("a: 2020-01-01", "is a date"),
        ("a: !!binary aGk=", "is a bytes"),
        ("a: !!set {b}", "is a set"),
        ("a: !!python/object:os.system x", "valid YAML"),
        ("1: a", "no text"),
        ("? [a]\n: b", "valid YAML"),
        ("a: .inf", "not finite"),
        ("a: &a [*a]", "nested"),
        (LAUGHS, "values"),
        ("[" * 5000, "nested|valid YAML"),
    ],
)
def test_yaml_that_is_more_than_plain_data(text: str, word: str, tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(SourceError, match=word):
        read_yaml(tmp_path / "x.yaml", "it")


def test_a_cache_is_as_it_was_written_or_nothing(tmp_path: Path) -> None:
    path = tmp_path / "scores.json"
    assert read_cache(dict[str, float], path) is None
    for text in ("", "{", "[1]", '{"a": NaN}', '{"a": "x"}', "[" * 100_000, '{"a": 1' + "0" * 400):
        path.write_text(text)
        assert read_cache(dict[str, float], path) is None
    path.write_text('{"a": 0.5}')
    assert read_cache(dict[str, float], path) == {"a": 0.5}


def test_a_file_says_how_large_it_is_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.touch()
    os.truncate(path, 1 << 40)  # a hole
    with pytest.raises(SourceError, match="bytes long"):
        read_json(path, "it")
    with pytest.raises(SourceError, match="bytes long"):
        read_json(Path("/dev/zero"), "it")
    with pytest.raises(SourceError, match="cannot read"):
        read_json(tmp_path / "missing", "it")


@pytest.mark.parametrize("text", ["nan", "inf", "-Infinity", "1e999"])
def test_a_text_is_no_way_to_say_infinity(text: str) -> None:
    for kind, data in ((dict[str, float], {"a": text}), (list[float], [1.0, text])):
        with pytest.raises(SourceError, match="not finite"):
            validated(kind, data, "x")
    # Where a file may hold infinity as a number, it may.
    assert validated(list[float], [float("inf")], "x") == [float("inf")]
