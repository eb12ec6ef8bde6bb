"""What PEFT and transformers call things is known in one place each, and all readers agree."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from builders import make_adapter
from lora_merge.adapters.access.live_modules import is_conv1d, linear_shape
from lora_merge.adapters.base_names import weight_of
from lora_merge.adapters.base_weights import CheckpointBase
from lora_merge.adapters.identity.expert_names import expert_place, is_expert_module
from lora_merge.adapters.module_names import unwrapped
from lora_merge.files.checkpoint import Checkpoint, open_checkpoint

EXPERTS = "model.layers.3.mlp.experts"


@pytest.mark.parametrize(
    ("name", "bare"),
    [
        ("h.0.attn.base_layer", "h.0.attn"),
        ("h.0.attn.base_layer.out_proj", "h.0.attn.out_proj"),
        (f"{EXPERTS}.base_layer.base_layer", EXPERTS),
        ("h.0.base_layers.q", "h.0.base_layers.q"),
    ],
)
def test_wrappers_are_taken_off_everywhere_and_nothing_else(name: str, bare: str) -> None:
    assert unwrapped(name) == bare == unwrapped(bare)


@pytest.mark.parametrize(
    ("name", "place"),
    [
        (f"{EXPERTS}.12.up_proj", (EXPERTS, 12, "up_proj")),
        ("experts.0.w1", ("experts", 0, "w1")),
        (f"{EXPERTS}.12", None),
        (f"{EXPERTS}.gate_up_proj", None),
        ("model.layers.3.mlp.shared_experts.1.up_proj", None),
        (f"{EXPERTS}.1.mlp.up_proj", None),
    ],
)
def test_an_experts_place_is_read_in_one_way(name: str, place: tuple | None) -> None:
    assert expert_place(name) == place
    assert is_expert_module(name) == (place is not None)


def save_gpt2(folder: Path, weight: torch.Tensor, kind: str) -> Checkpoint:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": kind}))
    save_file({"h.0.mlp.c_proj.weight": weight}, folder / "model.safetensors")
    return open_checkpoint(folder)


@pytest.mark.parametrize("said", [True, False])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_square_conv1d_is_turned_by_every_reader_and_no_other(
    said: bool, kind: str, tmp_path: Path
) -> None:
    weight = torch.randn(6, 6, generator=torch.Generator().manual_seed(0))
    base = save_gpt2(tmp_path / "base", weight, kind)
    adapter = make_adapter(shapes={"h.0.mlp.c_proj": (6, 6)}, fan_in_fan_out=said)
    spec = adapter.modules["h.0.mlp.c_proj"]
    expected = weight.mT if said or kind == "gpt2" else weight
    read = weight_of(adapter, spec, base)
    assert read is not None and torch.equal(read, expected)
    streamed = CheckpointBase(base).weight(spec.name, config=adapter.config)
    assert torch.equal(streamed.times(torch.eye(6)), expected)


def test_a_linear_layer_is_one_under_both_names() -> None:
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D(3, 5)  # nf, nx
    assert linear_shape(conv1d) == linear_shape(nn.Linear(5, 3)) == (3, 5)
    assert (
        is_conv1d(conv1d) and not is_conv1d(nn.Linear(5, 3)) and not is_conv1d(nn.Conv1d(1, 1, 1))
    )
    assert linear_shape(nn.LayerNorm(3)) is None and linear_shape(nn.Embedding(3, 5)) is None
