"""Tinker's 3-D expert factors: every expert's own delta, shared factors and all."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from builders import delta
from lora_merge.adapters.adapter import Adapter, build_adapter
from lora_merge.adapters.config import parse_config
from lora_merge.errors import AdapterError
from lora_merge.files.tensor_file import TensorDict

EXPERTS, RANK, HIDDEN, WIDTH = 3, 2, 8, 6
STEM = "base_model.model.model.layers.0.mlp.experts"
NAMES = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}


def stored(shared: bool = True, empty: bool = False) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random)

    stem = "base_model.model.model."
    tensors = {
        f"{stem}layers.0.self_attn.q_proj.lora_A.weight": normal(RANK, HIDDEN),
        f"{stem}layers.0.self_attn.q_proj.lora_B.weight": normal(HIDDEN, RANK),
        f"{stem}unembed_tokens.lora_A.weight": normal(RANK, HIDDEN),
        f"{stem}unembed_tokens.lora_B.weight": normal(20, RANK),
    }
    sizes = {"w1": (WIDTH, HIDDEN), "w2": (HIDDEN, WIDTH), "w3": (WIDTH, HIDDEN)}
    for leaf, (rows, columns) in sizes.items():
        a, b = ((EXPERTS, 1) if leaf == "w2" else (1, EXPERTS)) if shared else (EXPERTS, EXPERTS)
        key = f"{STEM}.{leaf}.lora_"
        if leaf == "w3" and empty:
            tensors |= {key + "A.weight": torch.zeros(0), key + "B.weight": torch.zeros(0)}
            continue
        tensors |= {key + "A.weight": normal(a, RANK, columns)}
        tensors |= {key + "B.weight": normal(b, rows, RANK)}
    return tensors


def opened(tensors: dict[str, Tensor], **config: Any) -> Adapter:
    said = {"peft_type": "LORA", "r": RANK, "lora_alpha": 6, "target_modules": "all-linear"}
    return build_adapter("mine", parse_config({**said, **config}, "mine"), TensorDict(tensors))


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("empty", [True, False])
def test_every_expert_has_its_delta(shared: bool, empty: bool, tmp_path: Path) -> None:
    tensors = stored(shared, empty)
    adapter = opened(tensors)
    assert adapter.dialect == "tinker"
    assert "lm_head" in adapter.modules
    for leaf, name in NAMES.items():
        if leaf == "w3" and empty:
            continue
        a, b = (tensors[f"{STEM}.{leaf}.lora_{half}.weight"].double() for half in "AB")
        for expert, dense in enumerate(torch.matmul(b, a)):  # broadcasts what is shared
            path = f"model.layers.0.mlp.experts.{expert}.{name}"
            torch.testing.assert_close(delta(adapter, path), 3 * dense)
    assert any("lacks this projection" in note for note in adapter.notes) == empty
    adapter.save_pretrained(tmp_path / "out")
    again = Adapter.from_pretrained(tmp_path / "out")
    assert again.dialect == "peft-lora" and again.modules.keys() == adapter.modules.keys()
    for name in adapter.modules:
        torch.testing.assert_close(delta(again, name), delta(adapter, name), rtol=1e-5, atol=1e-6)


def test_mixtrals_names_stay() -> None:
    tensors = {k.replace("mlp.experts", "block_sparse_moe.experts"): t for k, t in stored().items()}
    assert "model.layers.0.block_sparse_moe.experts.2.w3" in opened(tensors).modules


@pytest.mark.parametrize("half", ["A", "B"])
def test_stacks_that_do_not_fit_are_refused(half: str) -> None:
    tensors = stored()
    key = f"{STEM}.w2.lora_{half}.weight"
    wrong = torch.zeros(EXPERTS - 1, *tensors[key].shape[1:])
    with pytest.raises(AdapterError, match=r"experts\.w2.*no factors of 3 experts"):
        opened({**tensors, key: wrong})
    with pytest.raises(AdapterError, match="one of A and B"):
        opened({k: t for k, t in tensors.items() if k != key})


def shared_outer(numbered: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Megatron-Bridge's names for SGLang, and the deltas, each written out."""
    random = torch.Generator().manual_seed(1)
    tensors, deltas = {}, {}
    sizes = {"gate_proj": (WIDTH, HIDDEN), "up_proj": (WIDTH, HIDDEN), "down_proj": (HIDDEN, WIDTH)}
    for leaf, (rows, columns) in sizes.items():
        a = torch.randn(EXPERTS, RANK, columns, generator=random)
        b = torch.randn(EXPERTS, rows, RANK, generator=random)
        shared, own = (b, "A") if leaf == "down_proj" else (a, "B")
        shared[:] = shared[0].clone()
        pair = {"A": a, "B": b}
        other = "B" if own == "A" else "A"
        tensors[f"{STEM}.{leaf}.lora_{other}.weight"] = pair[other][:1]
        if numbered:
            for expert in range(EXPERTS):
                tensors[f"{STEM}.{expert}.{leaf}.lora_{own}.weight"] = pair[own][expert]
        else:
            tensors[f"{STEM}.{leaf}.lora_{own}.weight"] = pair[own]
        for expert in range(EXPERTS):
            deltas[f"model.layers.0.mlp.experts.{expert}.{leaf}"] = 3 * b[expert] @ a[expert]
    return tensors, deltas


@pytest.mark.parametrize("numbered", [True, False])
def test_shared_outer_factors_are_those_of_every_expert(numbered: bool) -> None:
    tensors, deltas = shared_outer(numbered)
    adapter = opened(tensors)
    assert adapter.modules.keys() == deltas.keys()
    for name, wanted in deltas.items():
        torch.testing.assert_close(delta(adapter, name), wanted.double(), rtol=1e-5, atol=1e-5)


def test_a_shared_factor_without_its_experts_is_refused() -> None:
    tensors, _ = shared_outer(numbered=True)
    for key in tensors:
        lost = {k: t for k, t in tensors.items() if k != key}
        if key.startswith(f"{STEM}.2."):  # another number of experts, and no config says how many
            assert len(opened(lost).modules) == 3 * EXPERTS - 1
        elif not any(key.startswith(f"{STEM}.{e}.") for e in range(EXPERTS)):
            with pytest.raises(AdapterError):
                opened(lost)
        wider = {**tensors, key: torch.cat([tensors[key], tensors[key]], dim=-2)}
        if key.endswith(("lora_A.weight", "gate_proj.lora_A.weight")):
            with pytest.raises(AdapterError):
                opened(wider)
