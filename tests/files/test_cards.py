"""Names from files in cards: the YAML says what it should, and no name ends its code span."""

import re

import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from lora_merge.files.pages.cards import block, code, front_matter, markdown, model_card

HOSTILE = st.text(st.sampled_from("a`|<>-:\n\r\t #'\"[]{}\x1b\u2028"), max_size=20)


@given(name=HOSTILE)
@example(name="x\n---\nlicense: mit")
@example(name="x: y")
def test_a_name_stays_the_value_of_its_field(name: str) -> None:
    head = front_matter(base_model=name, library_name="peft", tags=["lora"])
    first, text, rest = head.split("---\n", 2)
    assert (first, rest) == ("", "")
    data = yaml.safe_load(text)
    assert data.keys() <= {"base_model", "library_name", "tags"}
    if data.get("base_model"):
        assert data["base_model"].split() == re.sub(r"[\x00-\x1f\u2028]+", " ", name).split()


@given(name=HOSTILE)
def test_nothing_ends_a_code_span_or_a_table_cell(name: str) -> None:
    span = code(name)
    fence = re.match("`+", span)[0]
    inside = span[len(fence) : -len(fence)]
    assert fence not in re.findall("`+", inside) and "\n" not in span
    assert not re.search(r"(?<!\\)\|", span)
    assert not re.search(r"[<\n]|(?<!\\)\|", markdown(name))


@given(text=HOSTILE)
def test_nothing_ends_a_block(text: str) -> None:
    lines = block(text + "\n", "yaml").split("\n")
    fence = lines[0].removesuffix("yaml")
    assert lines[-2] == fence and not any(fence in line for line in lines[1:-2])


def test_a_card_with_hostile_names_has_the_fields_it_should() -> None:
    evil = "x\n---\nlicense: mit\n<script>alert(1)</script>|`"
    card = model_card(
        title="t", base_model=evil, sources=[(evil, "1")], method="m", recipe=evil, notes=[evil]
    )
    _, head, body = card.split("---\n", 2)
    assert yaml.safe_load(head).keys() == {
        "base_model", "base_model_relation", "library_name", "tags"
    }  # fmt: skip
    outside = re.sub(r"(`+).*?(?<!`)\1(?!`)", "", body, flags=re.DOTALL)
    assert "<script>" not in outside
