"""AdaLoRA and SoRA: gates folded into A, against PEFT's AdaLoRA and SoRA's own formula."""

import json

import pytest
import torch
from safetensors.torch import load_file

from adalora import save_adalora
from builders import adapter_parts, make_adapter, save_parts
from lora_merge.adapters.adapter import Adapter, build_adapter
from lora_merge.adapters.alignment import align, read_stacks
from lora_merge.adapters.config import parse_config
from lora_merge.errors import AdapterError
from lora_merge.files.tensor_file import TensorDict

pytest.importorskip("peft")
# PEFT reads its own boolean rank_pattern as a LoRA's, and takes modules of rank 0 for damaged.
pytestmark = pytest.mark.filterwarnings("ignore:.*rank_pattern|Adapter 'default'")


def deltas(adapter: Adapter) -> dict[str, torch.Tensor]:
    alignment = align([adapter])
    return {
        module.name: next(read_stacks(alignment, module)).delta() for module in alignment.modules
    }


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("alpha", [32, -1])
@pytest.mark.parametrize(
    "kept",
    [
        None,
        {"up": [True, False, True, True, False, True], "down": [False] * 5 + [True]},
    ],
)
def test_adalora_is_what_peft_makes_of_it(tmp_path, kept, alpha, transposed):
    expected = save_adalora(tmp_path, kept, alpha=alpha, transposed=transposed)
    adapter = Adapter.from_pretrained(tmp_path)
    for name, delta in deltas(adapter).items():
        wanted = expected[name].T if transposed else expected[name]
        torch.testing.assert_close(delta, wanted, rtol=1e-5, atol=1e-6)
        assert adapter.modules[name].rank == (sum(kept[name]) if kept else 6)
    assert not adapter.extras
    assert adapter.config.fan_in_fan_out is transposed


def test_sixteen_bit_gates_are_folded_without_rounding(tmp_path):
    save_adalora(tmp_path, None, dtype=torch.bfloat16)
    adapter = Adapter.from_pretrained(tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    stem = "base_model.model.up.lora_"
    exact = stored[stem + "A"].double() * stored[stem + "E"].double()
    assert torch.equal(adapter.read("up")[0].double(), exact)


def test_a_module_pruned_to_nothing_is_left_out_and_named(tmp_path):
    expected = save_adalora(tmp_path, {"up": [False] * 6, "down": [True] * 6})
    adapter = Adapter.from_pretrained(tmp_path)
    assert list(adapter.modules) == ["down"]
    assert "no rank left (up)" in adapter.notes[0]
    torch.testing.assert_close(deltas(adapter)["down"], expected["down"], rtol=1e-5, atol=1e-6)


def test_nothing_left_at_all_is_refused(tmp_path):
    save_adalora(tmp_path, {"up": [False] * 6, "down": [False] * 6})
    with pytest.raises(AdapterError, match="no module has any rank left"):
        Adapter.from_pretrained(tmp_path)


@pytest.mark.parametrize("ending", ["", ".lora"])
@pytest.mark.parametrize("kind", ["LORA", "SORA"])
def test_sora_is_what_its_layer_computes(tmp_path, ending, kind):
    config, tensors = adapter_parts(r=4, alpha=8)
    config["peft_type"] = kind
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(1))
    stored, outputs = {}, {}
    for name in make_adapter().modules:
        stem = f"base_model.model.{name}.lora_"
        a, b = tensors[f"{stem}A.weight"], tensors[f"{stem}B.weight"]
        gate = torch.tensor([[0.5, 0.0, -2.0, 0.0]])
        outputs[name] = (x @ a.T).mul(gate) @ b.T * 2.0  # TsinghuaC3I/SoRA, src/lora.py
        stored |= {f"{name}{ending}.{key}": t for key, t in (("lora_A", a), ("lora_B", b))}
        stored[f"{name}{ending}.gate"] = gate
    adapter = Adapter.from_pretrained(save_parts(tmp_path, config, stored))
    assert set(adapter.modules) == set(outputs)
    for name, delta in deltas(adapter).items():
        torch.testing.assert_close(x @ delta.T, outputs[name])


def test_a_routers_gate_is_no_gate_of_units():
    config, tensors = adapter_parts(modules_to_save=["gate"])
    tensors["base_model.model.model.layers.0.mlp.gate.weight"] = torch.zeros(4, 16)
    adapter = build_adapter("a", parse_config(config, "a"), TensorDict(tensors))
    assert list(adapter.extras) == ["model.layers.0.mlp.gate.weight"]
    assert all(spec.recipe.is_stored for spec in adapter.modules.values())


def test_gates_that_do_not_fit_are_refused(tmp_path):
    save_adalora(tmp_path, None)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    tensors = load_file(tmp_path / "adapter_model.safetensors")

    def build(raw, stored):
        build_adapter("a", parse_config(raw, "a"), TensorDict(stored))

    with pytest.raises(AdapterError, match="lora_E without an AdaLoRA config"):
        build({**config, "peft_type": "LORA", "r": 6, "rank_pattern": None}, tensors)
    with pytest.raises(AdapterError, match="lora_E is missing"):
        build(config, {k: v for k, v in tensors.items() if "lora_E" not in k})
    with pytest.raises(AdapterError, match="one number per unit"):
        build(config, {k: v[:2] if "lora_E" in k else v for k, v in tensors.items()})
    with pytest.raises(AdapterError, match="init_r = 0"):
        parse_config({**config, "init_r": 0}, "a")
