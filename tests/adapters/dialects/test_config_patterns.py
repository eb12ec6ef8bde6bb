"""Patterns of a config: Python's own matcher is the oracle, and no pattern takes long."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_merge.adapters.config import parse_config
from lora_merge.adapters.dialects.config_patterns import PatternError, first_match, matcher
from lora_merge.errors import AdapterError

_PIECES = (
    r"a b . \. [ab] [^a] \d \w (a|b.) (?:ab) a* b+ (ab)? .* .+? [a-c]{1,2} ^ $ (a*b)* | 0 \b (?=a)"
    r" (?!.*b)"
)
PIECES = st.sampled_from(_PIECES.split())


@settings(max_examples=400)
@given(pattern=st.lists(PIECES, max_size=7).map("".join), name=st.text("ab.0", max_size=8))
def test_it_says_what_re_says(pattern: str, name: str) -> None:
    try:
        expected = re.match(rf"(.*\.)?({pattern})$", name) is not None
    except re.error:
        return
    assert matcher(pattern)(name) == expected
    fully = re.fullmatch(pattern, name) is not None
    assert matcher(pattern, whole=True)(name) == fully


def test_what_trainers_write_is_known() -> None:
    """Unsloth's and Qwen-VL users' target_modules."""
    unsloth = (
        r"(?:.*?(?:language|text).*?(?:self_attn|mlp).*?(?:q_proj|up_proj).*?)"
        r"|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|mlp)\.(?:(?:q_proj|up_proj)))"
    )
    qwen = r"^(?!.*visual).*(?:q_proj|up_proj).*"
    for name in (
        "model.layers.3.mlp.up_proj",
        "model.visual.3.q_proj",
        "model.language.a.mlp.q_proj",
    ):
        for pattern in (unsloth, qwen):
            assert matcher(pattern, whole=True)(name) == bool(re.fullmatch(pattern, name))


@pytest.mark.parametrize(
    "pattern",
    ["(a+)+!", "(.*)*(.*)*x", r"((\w+\.?)+)+!", "a?" * 60 + "!", "(a|a)*!", "((a{99}){99}){99}"],
)
def test_no_pattern_takes_for_ever(pattern: str) -> None:
    assert first_match([pattern], "a" * 200) is None  # the time limit of the test


@pytest.mark.parametrize(
    "pattern",
    [
        *("(", "(?<=a)", r"(a)\1", "a{5000}", r"\B", "(?i)a", "a++", "a" * 20_000),
        "(" * 3000 + ")" * 3000,
        "(" * 9 + "a" + ")*" * 9,
    ],
)
def test_what_no_module_name_needs_is_refused(pattern: str) -> None:
    with pytest.raises(PatternError):
        matcher(pattern)
    raw = {"peft_type": "LORA", "rank_pattern": {pattern: 4}}
    with pytest.raises(AdapterError, match="rank_pattern"):
        parse_config(raw, "a")
