"""Patterns of module names mean one thing everywhere, and one that means nothing is refused."""

from pathlib import Path
from typing import Any

import pytest

import lora_merge
from builders import make_adapter, save_adapter
from lora_merge.adapters.measured.spectra import adapter_spectra
from lora_merge.adapters.module_names import count_layers, layer_of, place_of
from lora_merge.adapters.patterns import matches, select_names
from lora_merge.cli.app import run
from lora_merge.errors import LoraMergeError, MethodError

Q = "model.layers.0.self_attn.q_proj"
NAMES = [Q, "model.layers.1.self_attn.q_proj", "model.layers.10.mlp.up_proj", "lm_head"]


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("q_proj", [0, 1]),  # a part of the name, as in mergekit
        ("layers.1.", [1]),
        ("layers.1", [1, 2]),
        ("q_proj.weight", [0, 1]),
        ("0.*.q_proj", [0]),  # a glob whose beginning is left out
        ("model.layers.?.self_attn.*", [0, 1]),
        ("layers.[01].*", [0, 1]),
        ("*", [0, 1, 2, 3]),
    ],
)
def test_one_language(pattern: str, found: list[int]) -> None:
    assert [i for i, name in enumerate(NAMES) if matches(name, pattern)] == found
    assert select_names(NAMES, [pattern], "a") == [NAMES[i] for i in found]


def test_a_layer_number_is_read_in_one_way() -> None:
    for name, layer in (("model.layers.3", 3), ("model.layers.3.mlp.up", 3), ("lm_head", None)):
        assert place_of(name).layer == layer
        assert count_layers([name]) == (0 if layer is None else layer + 1)
    assert layer_of("model.layers.3") == layer_of("model.layers.3.mlp.up") == "layers.3"
    assert place_of("model.layers.3").kind == "layers"


def refusals() -> dict[str, Any]:
    a, b = make_adapter("a"), make_adapter("b", seed=1)
    wrong = [{"filter": "0.*.q_porj", "value": 1.0}]
    return {
        "weight": lambda: lora_merge.merge([a, b], method="svd", weights=[wrong, 1.0]),
        "behind a match": lambda: lora_merge.merge(
            [a, b], method="svd", weights=[[{"value": 1.0}, *wrong], 1.0]
        ),
        "own parameter": lambda: lora_merge.merge(
            [a, b], method="ties", own_parameters=[{"density": wrong}, {}]
        ),
        "shared parameter": lambda: lora_merge.merge(
            [a, b], method="ties", parameters={"density": wrong}
        ),
        "spectra": lambda: adapter_spectra(a, modules=["q_proj", "0.*.q_porj"]),
        "compare": lambda: lora_merge.compare([a, b], modules=["0.*.q_porj"]),
    }


@pytest.mark.parametrize("where", refusals())
def test_what_matches_nothing_is_refused_by_name(where: str) -> None:
    with pytest.raises(MethodError, match=r"0\.\*\.q_porj") as caught:
        refusals()[where]()
    assert "q_proj" in caught.value.remedy


def test_a_filter_with_its_beginning_left_out_weighs(tmp_path: Path) -> None:
    """It once matched nothing, and the adapter was merged as if it were untrained."""
    folders = [str(save_adapter(tmp_path / n, seed=i)) for i, n in enumerate("ab")]
    out = str(tmp_path / "out")
    weights = ["-w", '[{filter: "0.*.q_proj", value: 1.0}]', "-w", "1"]
    assert run(["merge", *folders, "-M", "cat", *weights, "-o", out]) == 0
    ranks = {n: s.rank for n, s in lora_merge.Adapter.from_pretrained(out).modules.items()}
    assert ranks  # padded to one rank
    spectra = adapter_spectra(lora_merge.Adapter.from_pretrained(out)).by_module
    rank = {name: int((values > 1e-6).sum()) for name, values in spectra.items()}
    assert rank.pop(Q) == 8
    assert set(rank.values()) == {4}


def test_extract_refuses_patterns_of_nothing(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    from lora_merge.files.checkpoint import open_checkpoint
    from lora_merge.reshape.coverage import survey

    save_file({"layers.0.q_proj.weight": torch.ones(2, 2)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    base = open_checkpoint(tmp_path)
    assert survey(base, base, include=["q_proj"])[0] == ["layers.0.q_proj.weight"]
    for pattern in ({"include": ["q_porj"]}, {"exclude": ["q_porj"]}):
        with pytest.raises(LoraMergeError, match="did you mean q_proj"):
            survey(base, base, **pattern)
