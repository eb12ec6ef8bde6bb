"""mlx-lm and torchtune: our delta is their layers' own, and mlx-lm loads what we write."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from builders import adapter_parts, save_parts
from lora_merge import merge
from lora_merge.adapters.adapter import Adapter, save_adapter
from lora_merge.adapters.alignment import align, read_stacks
from lora_merge.adapters.formats.table import FORMATS
from lora_merge.errors import AdapterError

MLX_CONFIG = {
    "fine_tune_type": "lora",
    "model": "mlx-community/tiny",
    "num_layers": 2,
    "lora_parameters": {"rank": 3, "scale": 20.0, "dropout": 0.0},
}


def mlx_tensors(seed: int = 0) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    found = {}
    for name, (d_in, d_out) in {
        "model.layers.0.self_attn.q_proj": (8, 12),
        "model.layers.1.mlp.up_proj": (8, 20),
        "model.embed_tokens": (30, 8),
    }.items():
        found[f"{name}.lora_a"] = torch.randn(d_in, 3, generator=g)
        found[f"{name}.lora_b"] = torch.randn(3, d_out, generator=g)
    found["model.layers.1.mlp.switch_mlp.up_proj.lora_a"] = torch.randn(4, 3, 8, generator=g)
    found["model.layers.1.mlp.switch_mlp.up_proj.lora_b"] = torch.randn(4, 20, 3, generator=g)
    return found


def mlx_adapter(folder: Path, seed: int = 0, **config: Any) -> Adapter:
    folder.mkdir(parents=True)
    save_file(mlx_tensors(seed), folder / "adapters.safetensors")
    save_file(mlx_tensors(seed), folder / "0000100_adapters.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({**MLX_CONFIG, **config}))
    return Adapter.from_pretrained(folder)


def deltas(adapter: Adapter) -> dict[str, list[Tensor]]:
    alignment = align([adapter])
    return {m.name: [s.delta() for s in read_stacks(alignment, m)] for m in alignment.modules}


def test_mlx_deltas_are_those_of_mlx(tmp_path: Path) -> None:
    mx = pytest.importorskip("mlx.core", reason="pip install 'lora-merge[oracles]'")
    from mlx_lm.tuner.lora import LoRAEmbedding, LoRALinear, LoRASwitchLinear

    ours, stored = deltas(mlx_adapter(tmp_path / "a")), mlx_tensors()
    assert set(ours) == {key.rpartition(".")[0] for key in stored}
    for name, (delta, *experts) in ours.items():
        a, b = (mx.array(stored[f"{name}.lora_{h}"].numpy()) for h in "ab")
        if experts:
            layer = LoRASwitchLinear(8, 20, 4, r=3, scale=20.0)
            layer.linear.weight = mx.zeros((4, 20, 8))
            layer.lora_a, layer.lora_b = a, b
            theirs = layer.fuse().weight
            delta = torch.stack([delta, *experts])
        elif "embed" in name:
            layer = LoRAEmbedding(30, 8, r=3, scale=20.0)
            layer.embedding.weight = mx.zeros((30, 8))
            layer.lora_a, layer.lora_b = a, b
            theirs = layer(mx.arange(30)).T
        else:
            layer = LoRALinear(a.shape[0], b.shape[1], r=3, scale=20.0)
            layer.linear.weight = mx.zeros((b.shape[1], a.shape[0]))
            layer.lora_a, layer.lora_b = a, b
            theirs = layer(mx.eye(a.shape[0])).T
        torch.testing.assert_close(delta, torch.tensor(theirs.tolist()), rtol=1e-4, atol=1e-4)


def test_an_mlx_merge_is_written_for_mlx(tmp_path: Path) -> None:
    sources = [mlx_adapter(tmp_path / str(seed), seed) for seed in (0, 1)]
    merged = merge(sources, method="cat")
    merged.save_pretrained(tmp_path / "out")
    again = Adapter.from_pretrained(tmp_path / "out")
    assert again.dialect == "mlx" and again.config.base_model == "mlx-community/tiny"
    one, two, both = map(deltas, (*sources, again))
    for name, experts in both.items():
        for e, delta in enumerate(experts):
            torch.testing.assert_close(delta, one[name][e] + two[name][e], rtol=1e-4, atol=1e-3)


def test_mlx_lm_loads_what_is_written_for_it(tmp_path: Path) -> None:
    mx = pytest.importorskip("mlx.core", reason="pip install 'lora-merge[oracles]'")
    from mlx_lm.models import llama
    from mlx_lm.tuner.utils import load_adapters

    arguments = llama.ModelArgs(
        model_type="llama", hidden_size=16, num_hidden_layers=3, intermediate_size=40,
        num_attention_heads=2, rms_norm_eps=1e-6, vocab_size=32, num_key_value_heads=2,
    )  # fmt: skip
    model = llama.Model(arguments)
    shapes = {
        "model.layers.0.self_attn.q_proj": (16, 16),
        "model.layers.2.mlp.up_proj": (40, 16),
        "lm_head": (32, 16),
    }
    config, tensors = adapter_parts(shapes=shapes, alpha=6)
    if "lm_head" not in dict(model.named_modules()):
        del tensors["base_model.model.lm_head.lora_A.weight"]
        del tensors["base_model.model.lm_head.lora_B.weight"]
    adapter = Adapter.from_pretrained(save_parts(tmp_path / "peft", config, tensors))
    save_adapter(adapter, tmp_path / "mlx", file_format=FORMATS["mlx"])
    tokens = mx.array([[1, 5, 7, 2]])
    x = mx.eye(16)
    before = {name: dict(model.named_modules())[name](x) for name in adapter.modules}
    assert model(tokens).shape == (1, 4, 32)
    load_adapters(model, str(tmp_path / "mlx"))
    layers = dict(model.named_modules())
    for name, (delta,) in deltas(adapter).items():
        change = (layers[name](x) - before[name]).T
        torch.testing.assert_close(delta, torch.tensor(change.tolist()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("config", "word"),
    [
        ({"fine_tune_type": "full"}, "no low-rank"),
        ({"lora_parameters": {"rank": 3}}, "scale"),
        ({"lora_parameters": {"scale": "nan"}}, "scale"),
    ],
)
def test_what_mlx_does_not_say_is_refused(config: Any, word: str, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=word):
        mlx_adapter(tmp_path / "a", **config)


def test_mlx_dora_is_that_of_mlx(tmp_path: Path) -> None:
    g = torch.Generator().manual_seed(1)
    weight, norms = torch.randn(12, 8, generator=g), torch.rand(12, generator=g)
    a, b = torch.randn(8, 3, generator=g), torch.randn(3, 12, generator=g)
    name = "model.layers.0.self_attn.q_proj"
    folder, base = tmp_path / "a", tmp_path / "base"
    folder.mkdir(), base.mkdir()
    tensors = {f"{name}.lora_a": a, f"{name}.lora_b": b, f"{name}.m": norms}
    save_file(tensors, folder / "adapters.safetensors")
    said = {**MLX_CONFIG, "fine_tune_type": "dora"}
    (folder / "adapter_config.json").write_text(json.dumps(said))
    save_file({f"{name}.weight": weight}, base / "model.safetensors")
    with pytest.raises(AdapterError, match="DoRA") as refusal:
        Adapter.from_pretrained(folder, base=base)
    assert "lora-merge convert" in refusal.value.remedy
    moved = weight + 20 * (a @ b).mT
    theirs = moved * (norms / moved.norm(dim=1))[:, None]
    adapter = Adapter.from_pretrained(folder, base=base, rank=1 << 30)
    (delta,) = deltas(adapter)[name]
    torch.testing.assert_close(delta, theirs - weight, rtol=1e-4, atol=1e-4)
    mx = pytest.importorskip("mlx.core", reason="pip install 'lora-merge[oracles]'")
    from mlx_lm.tuner.dora import DoRALinear

    layer = DoRALinear(8, 12, r=3, scale=20.0)
    layer.linear.weight = mx.array(weight.numpy())
    layer.lora_a, layer.lora_b, layer.m = (mx.array(t.numpy()) for t in (a, b, norms))
    change = layer(mx.eye(8)).T - layer.linear.weight
    torch.testing.assert_close(delta, torch.tensor(change.tolist()), rtol=1e-4, atol=1e-4)


def tune_tensors(head_dim: int, heads: int, width: int, r: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    return {
        "layers.0.attn.q_proj.lora_a.weight": torch.randn(r, width, generator=g),
        "layers.0.attn.q_proj.lora_b.weight": torch.randn(heads * head_dim, r, generator=g),
        "layers.0.mlp.w2.lora_a.weight": torch.randn(r, 20, generator=g),
        "layers.0.mlp.w2.lora_b.weight": torch.randn(width, r, generator=g),
    }


def test_torchtunes_rotary_rows_turn_into_transformers(tmp_path: Path) -> None:
    """Rows that one rotation turns together are the same two in either library's order."""
    head_dim, heads, width, r = 8, 3, 24, 2
    tensors = tune_tensors(head_dim, heads, width, r)
    config = {"peft_type": "LORA", "r": r, "lora_alpha": 5, "head_dim": head_dim}
    folder = save_parts(tmp_path / "a", config, tensors)
    adapter = Adapter.from_pretrained(folder)
    assert list(adapter.modules) == [
        "model.layers.0.mlp.down_proj",
        "model.layers.0.self_attn.q_proj",
    ]
    (delta,) = deltas(adapter)["model.layers.0.self_attn.q_proj"]
    b = tensors["layers.0.attn.q_proj.lora_b.weight"]
    theirs = 2.5 * b @ tensors["layers.0.attn.q_proj.lora_a.weight"]
    x = torch.randn(width)
    # torchtune: neighbours are a pair; transformers: a row and the one half a head further.
    pairs, halves = (theirs @ x).reshape(heads, -1, 2), (delta @ x).reshape(heads, 2, -1)
    torch.testing.assert_close(pairs.mT, halves)


def test_torchtunes_dora_is_that_of_peft_in_its_own_order_of_rows(tmp_path: Path) -> None:
    """torchtune's forward on its own weight, brought to transformers' order of rows."""
    head_dim, heads, width, r = 8, 3, 24, 2
    tensors = tune_tensors(head_dim, heads, width, r)
    g = torch.Generator().manual_seed(5)
    norms, weight = torch.rand(24, generator=g), torch.randn(24, width, generator=g)
    tensors["layers.0.attn.q_proj.magnitude"] = norms
    config = {"peft_type": "LORA", "r": r, "lora_alpha": 5, "head_dim": head_dim}
    folder, base = save_parts(tmp_path / "a", config, tensors), tmp_path / "base"
    base.mkdir()
    # transformers' row i of the first half and of the second are torchtune's 2 i and 2 i + 1
    order = torch.arange(24).view(heads, -1, 2).mT.flatten()
    name = "model.layers.0.self_attn.q_proj"
    model = {f"{name}.weight": weight[order].contiguous()}
    model["model.layers.0.mlp.down_proj.weight"] = torch.zeros(width, 20)
    save_file(model, base / "model.safetensors")
    a, b = (tensors[f"layers.0.attn.q_proj.lora_{half}.weight"] for half in "ab")
    x = torch.eye(width)
    out, change = x @ weight.mT, x @ a.mT @ b.mT
    scale = norms / (weight + 2.5 * b @ a).norm(dim=1)
    theirs = ((scale - 1) * out + scale * change * 2.5).mT
    adapter = Adapter.from_pretrained(folder, base=base, rank=1 << 30)
    (delta,) = deltas(adapter)[name]
    torch.testing.assert_close(delta, theirs[order], rtol=1e-4, atol=1e-4)
    with pytest.raises(AdapterError, match="DoRA") as refusal:
        Adapter.from_pretrained(folder, base=base)
    assert "lora-merge convert" in refusal.value.remedy


def test_torchtune_without_the_size_of_a_head_is_refused(tmp_path: Path) -> None:
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 5}
    folder = save_parts(tmp_path / "a", config, tune_tensors(8, 3, 24, 2))
    with pytest.raises(AdapterError) as refusal:
        Adapter.from_pretrained(folder)
    assert "head_dim" in refusal.value.remedy
