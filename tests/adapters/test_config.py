"""Reading adapter_config.json: PEFT's rules, and refusals by name."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key

from builders import adapter_parts
from lora_merge.adapters.adapter import build_adapter
from lora_merge.adapters.config import parse_config, read_config
from lora_merge.errors import AdapterError
from lora_merge.files.tensor_file import TensorDict

PATTERNS = ["q_proj", r"layers\.0\.q_proj", "^model.layers.1.q_proj", "self_attn.*", "up", "proj"]
MODULES = [
    "model.layers.0.q_proj",
    "model.layers.1.q_proj",
    "model.layers.1.mlp.up",
    "q_proj",
    "x.xq_proj",
    "model.self_attn.v",
]


def config(**fields: Any) -> Any:
    return parse_config({"peft_type": "LORA", "r": 8, "lora_alpha": 16, **fields}, "mine")


@given(order=st.permutations(PATTERNS), module=st.sampled_from(MODULES))
def test_patterns_match_as_in_peft(order: list[str], module: str) -> None:
    pattern = {key: rank + 1 for rank, key in enumerate(order)}
    expected = pattern.get(get_pattern_key(pattern.keys(), module), 8)
    parsed = config(rank_pattern=pattern, alpha_pattern=pattern)
    assert parsed.rank_of(module) == expected
    alpha = pattern.get(get_pattern_key(pattern.keys(), module), 16)
    assert parsed.scaling_of(module, 4) == alpha / 4


def test_rslora_divides_by_the_root() -> None:
    assert config(use_rslora=True).scaling_of("m", 16) == 4.0


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"peft_type": "IA3"}, "IA3"),
        ({"peft_type": None}, "None"),
        ({"use_dora": True}, "lora_magnitude_vector.weight is missing"),
        ({"enable_lora": [True, False]}, "MergedLinear"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa"),
        ({"alora_invocation_tokens": [1, 2]}, "aLoRA"),
        ({"r": 0}, "positive rank"),
        ({"rank_pattern": {"q": 0}}, "q = 0"),
        ({"r": "many"}, "wrong type"),
        ({"target_modules": 3}, "target_modules"),
        ({"rank_pattern": {"q(": 4}}, r"rank_pattern .*'q\('"),
        ({"alpha_pattern": {"*q": 4}}, r"alpha_pattern .*'\*q'"),
        ({"lora_alpha": float("nan")}, "lora_alpha = nan"),
        ({"alpha_pattern": {"q": float("inf")}}, "q = inf"),
    ],
)
def test_what_is_not_plain_lora_is_refused(fields: dict[str, Any], word: str) -> None:
    _, tensors = adapter_parts()
    with pytest.raises(AdapterError, match=word) as caught:
        build_adapter("mine", config(**fields), TensorDict(tensors))
    assert "mine" in str(caught.value)
    assert caught.value.remedy


@pytest.mark.parametrize("text", ["{", "[1]", '{"peft_type": "LORA", "r": 1', "\x00"])
def test_broken_files_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "adapter_config.json"
    path.write_text(text)
    with pytest.raises(AdapterError, match="mine"):
        read_config(path, "mine")


def test_unknown_fields_are_no_obstacle(tmp_path: Path) -> None:
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({"peft_type": "lora", "r": 2, "lora_alpha": 2, "future": {"x": 1}}))
    assert read_config(path, "mine").r == 2
