"""GGUF adapters: scaling and layouts as llama.cpp has them, rows that rotate alike, damage."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

import lora_merge
from builders import adapter_parts, delta, save_adapter, save_parts
from lora_merge.adapters.adapter import Adapter
from lora_merge.adapters.alignment import align
from lora_merge.cli.app import run
from lora_merge.errors import AdapterError, AlignmentError, LoraMergeError, SourceError
from lora_merge.reshape.convert import ConversionPlan
from lora_merge.reshape.gguf_names import _turned

gguf = pytest.importorskip("gguf", reason="pip install 'lora-merge[gguf]'")

HEADS, GROUPS, SIZE = 4, 2, 6
SHAPES = {
    f"model.layers.{layer}.{name}": shape
    for layer in range(2)
    for name, shape in {
        "self_attn.q_proj": (HEADS * SIZE, 16),
        "self_attn.k_proj": (GROUPS * SIZE, 16),
        "self_attn.v_proj": (GROUPS * SIZE, 16),
        "mlp.down_proj": (16, 40),
    }.items()
} | {"lm_head": (30, 16)}


def base(folder: Path, kind: str = "llama", shapes: Any = SHAPES, **more: Any) -> Path:
    folder.mkdir()
    config = {"model_type": kind, "num_hidden_layers": 2, "num_attention_heads": HEADS, **more}
    (folder / "config.json").write_text(json.dumps({"num_key_value_heads": GROUPS, **config}))
    tensors = {f"{name}.weight": torch.zeros(*shape) for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors")
    return folder


def there(adapter: Adapter, out: Path, to: str, model: Path) -> Adapter:
    lora_merge.convert(adapter, out, to=to, base=model)
    return Adapter.from_pretrained(out)


def plan(adapter: Adapter, **options: Any) -> ConversionPlan:
    return lora_merge.plan_convert(adapter, to="gguf", **options)


def written(path: Path, tensors: dict[str, Tensor], alpha: float = 0.0, **said: Any) -> Adapter:
    """A file as llama.cpp's own converter writes it, by the package."""
    writer = gguf.GGUFWriter(path, said.pop("architecture", "llama"))
    writer.add_type(said.pop("kind", "adapter"))
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", alpha)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return Adapter.from_pretrained(path)


@given(
    heads=st.integers(1, 5), half=st.integers(1, 4), position=st.integers(0, 50), seed=st.integers()
)
def test_rows_are_permuted_as_the_rotation_wants(heads, half, position, seed) -> None:
    """llama.cpp rotates (2i, 2i + 1), transformers (i, i + d / 2): one query, one set of angles."""
    g = torch.Generator().manual_seed(seed % 2**32)
    size = 2 * half
    weight = torch.randn(heads * size, 3, generator=g, dtype=torch.float64)
    x = torch.randn(3, generator=g, dtype=torch.float64)
    angle = position * 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    cos, sin = angle.cos(), angle.sin()
    halves = (weight @ x).view(heads, 2, half)
    first, second = halves[:, 0], halves[:, 1]
    theirs = torch.stack([first * cos - second * sin, second * cos + first * sin], dim=2)
    pairs = (_turned(x[None], weight, heads=heads, back=False)[1] @ x).view(heads, half, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    ours = torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=2)
    torch.testing.assert_close(ours, theirs)
    again = _turned(*_turned(x[None], weight, heads=heads, back=False), heads=heads, back=True)
    assert torch.equal(again[1], weight)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3_text"])
def test_there_and_back_is_the_same_delta(kind: str, tmp_path: Path) -> None:
    model = base(tmp_path / "base", kind)
    adapter = Adapter.from_pretrained(
        save_adapter(tmp_path / "a", shapes=SHAPES, rank_pattern={"layers.1.mlp.down_proj": 2})
    )
    ours = there(adapter, tmp_path / "gguf", "gguf", model)
    assert ours.dialect == "gguf" and {s.scaling for s in ours.modules.values()} == {1.0}
    assert ours.modules["blk.1.ffn_down"].rank == 2  # any rank is right with an alpha of 0
    q = "model.layers.0.self_attn.q_proj"
    v = "model.layers.0.self_attn.v_proj"
    torch.testing.assert_close(delta(ours, "blk.0.attn_v"), delta(adapter, v))
    same = torch.allclose(delta(ours, "blk.0.attn_q"), delta(adapter, q), atol=1e-6)
    assert same == (kind != "llama")
    back = there(ours, tmp_path / "back", "peft", model)
    assert back.modules.keys() == adapter.modules.keys()
    for name in adapter.modules:
        torch.testing.assert_close(delta(back, name), delta(adapter, name), rtol=1e-5, atol=1e-7)


def test_stacked_experts_go_to_tensors_of_their_own(tmp_path: Path) -> None:
    experts, hidden, inner, r = 3, 16, 10, 2
    shapes = {
        f"model.layers.0.mlp.experts.{e}.{name}": (hidden, inner)
        if "down" in name
        else (inner, hidden)
        for e in range(experts)
        for name in ("gate_proj", "up_proj", "down_proj")
    }
    model = base(tmp_path / "base", "qwen3_moe", shapes, num_experts=experts)
    stem = "base_model.model.model.layers.0.mlp.experts"
    tensors = {
        f"{stem}.base_layer.lora_A.weight": torch.randn(experts * r, hidden),
        f"{stem}.base_layer.lora_B.weight": torch.randn(2 * inner, experts * r),
        f"{stem}.lora_A.weight": torch.randn(experts * r, inner),
        f"{stem}.lora_B.weight": torch.randn(hidden, experts * r),
    }
    config, _ = adapter_parts(
        r=r, target_modules=[], peft_version="0.21.2",
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    )  # fmt: skip
    adapter = Adapter.from_pretrained(save_parts(tmp_path / "a", config, tensors))
    ours = there(adapter, tmp_path / "gguf", "gguf", model)
    assert set(ours.modules) == {f"blk.0.ffn_{p}_exps" for p in ("gate", "up", "down")}
    whole = adapter.stacks("model.layers.0.mlp.experts.gate_up_proj")
    for e in range(experts):
        gate, up = (ours.stacks(f"blk.0.ffn_{p}_exps")[e].delta() for p in ("gate", "up"))
        torch.testing.assert_close(torch.cat([gate, up]), whole[e].delta())
    back = there(ours, tmp_path / "back", "peft", model)
    assert back.modules.keys() == shapes.keys()
    alignment = align([adapter, back])  # a module per expert and a parameter for all are one thing
    assert len(alignment.modules) == 2


@pytest.mark.parametrize("alpha", [0.0, 6.0])
def test_what_the_package_writes_is_read(alpha: float, tmp_path: Path) -> None:
    a, b = torch.randn(4, 64), torch.randn(24, 4)
    vocabulary = (torch.randn(50, 4), torch.randn(64, 4))
    adapter = written(
        tmp_path / "x.gguf",
        {
            "blk.0.attn_v.weight.lora_a": a,
            "blk.0.attn_v.weight.lora_b": b,
            "token_embd.weight.lora_a": vocabulary[0],
            "token_embd.weight.lora_b": vocabulary[1],
            "blk.0.attn_norm.weight": torch.ones(64),
        },
        alpha,
    )
    scale = alpha / 4 if alpha else 1.0
    torch.testing.assert_close(delta(adapter, "blk.0.attn_v"), scale * b.double() @ a.double())
    spec = adapter.modules["token_embd"]
    assert (spec.form, spec.d_in, spec.d_out) == ("embedding", 50, 64)
    want = scale * vocabulary[1].double() @ vocabulary[0].double().mT
    torch.testing.assert_close(delta(adapter, "token_embd"), want)
    assert any("norms" in note for note in adapter.notes)


def test_quantised_tensors_are_dequantised(tmp_path: Path) -> None:
    from gguf.quants import dequantize, quantize

    kind = gguf.GGMLQuantizationType.Q8_0
    a = torch.randn(4, 64)
    packed = quantize(a.numpy(), kind)
    writer = gguf.GGUFWriter(tmp_path / "q.gguf", "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_tensor("blk.0.attn_v.weight.lora_a", packed, raw_dtype=kind)
    writer.add_tensor("blk.0.attn_v.weight.lora_b", torch.ones(8, 4).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    read, _ = Adapter.from_pretrained(tmp_path / "q.gguf").read("blk.0.attn_v")
    assert torch.equal(read, torch.from_numpy(dequantize(packed, kind)))
    assert float((read - a).norm() / a.norm()) < 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_package_reads_what_is_written(dtype: torch.dtype, tmp_path: Path) -> None:
    model = base(tmp_path / "base")
    adapter = Adapter.from_pretrained(save_adapter(tmp_path / "a", shapes=SHAPES, dtype=dtype))
    ours = there(adapter, tmp_path / "gguf", "gguf", model)
    path = tmp_path / "gguf" / "adapter.gguf"
    reader = gguf.GGUFReader(path)
    assert path.stat().st_size == plan(adapter, base=model).output.num_bytes
    said = {k: f.contents() for k, f in reader.fields.items() if not k.startswith("GGUF.")}
    assert said["general.type"] == "adapter" and said["adapter.lora.alpha"] == 0.0
    assert said["general.architecture"] == "llama"
    assert len(reader.tensors) == 2 * len(SHAPES)
    for tensor in reader.tensors:
        raw = torch.from_numpy(tensor.data.copy())
        got = raw.view(torch.bfloat16) if dtype == torch.bfloat16 else raw
        a, b = ours.read(tensor.name.partition(".weight")[0])
        assert torch.equal(got, a if tensor.name.endswith("a") else b)


def test_what_has_no_place_is_refused(tmp_path: Path) -> None:
    adapter = Adapter.from_pretrained(save_adapter(tmp_path / "a", shapes=SHAPES))
    with pytest.raises(AdapterError) as refusal:
        plan(adapter)
    assert "--base" in refusal.value.remedy
    strange = base(tmp_path / "bloom", "bloom")
    with pytest.raises(AdapterError, match="'bloom'"):
        plan(adapter, base=strange)
    tied = {name: shape for name, shape in SHAPES.items() if name != "lm_head"}
    with pytest.raises(AdapterError, match="lm_head"):
        plan(adapter, base=base(tmp_path / "t", shapes=tied))
    model = base(tmp_path / "base")
    config, tensors = adapter_parts(shapes=SHAPES, modules_to_save=["score"])
    tensors["base_model.model.score.weight"] = torch.ones(2, 16)
    whole = Adapter.from_pretrained(save_parts(tmp_path / "whole", config, tensors))
    with pytest.raises(AdapterError, match="score"):
        plan(whole, base=model)
    wide = Adapter.from_pretrained(
        save_adapter(tmp_path / "wide", shapes=SHAPES, dtype=torch.float64)
    )
    with pytest.raises(AdapterError) as refusal:
        plan(wide, base=model)
    assert "float32" in refusal.value.remedy
    plan(wide, base=model, dtype="float32")


def test_fuse_finds_what_a_gguf_adapter_changes(tmp_path: Path) -> None:
    """Names and the order of rows come from the base: the result is that of the PEFT adapter."""
    model = base(tmp_path / "base")
    adapter = Adapter.from_pretrained(save_adapter(tmp_path / "a", shapes=SHAPES))
    ours = there(adapter, tmp_path / "gguf", "gguf", model)
    fused = [tmp_path / "one", tmp_path / "other"]
    for one, out in zip((adapter, ours), fused, strict=True):
        lora_merge.fuse(one, base=model, out=out)
    wanted, found = (load_file(out / "model.safetensors") for out in fused)
    for name, tensor in wanted.items():
        assert tensor.any()
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-5)
    with pytest.raises(SourceError, match="a GGUF file") as refusal:
        lora_merge.fuse(ours, base=tmp_path / "gguf" / "adapter.gguf", out=tmp_path / "three")
    assert "converted from" in refusal.value.remedy


def test_other_files_and_other_architectures_are_named(tmp_path: Path) -> None:
    pair = {"blk.0.attn_v.weight.lora_a": torch.ones(2, 8)}
    pair["blk.0.attn_v.weight.lora_b"] = torch.ones(8, 2)
    with pytest.raises(AdapterError, match="'model'"):
        written(tmp_path / "model.gguf", pair, kind="model")
    with pytest.raises(AdapterError, match=r"attn_v\.bias"):
        written(tmp_path / "more.gguf", {**pair, "blk.0.attn_v.bias": torch.ones(8)})
    with pytest.raises(AdapterError, match="lora_b is missing"):
        written(tmp_path / "half.gguf", {"blk.0.attn_v.weight.lora_a": torch.ones(2, 8)})
    one = written(tmp_path / "one.gguf", pair)
    other = written(tmp_path / "other.gguf", pair, architecture="qwen2")
    with pytest.raises(AlignmentError, match="llama, qwen2"):
        align([one, other])
    with pytest.raises(AdapterError, match="gguf"):
        align([one, Adapter.from_pretrained(save_adapter(tmp_path / "a"))])


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=100)
@given(data=st.data())
def test_a_damaged_file_is_an_error_and_nothing_else(data: st.DataObject, tmp_path: Path) -> None:
    path = tmp_path / "good.gguf"
    if not path.exists():
        pair = {"blk.0.attn_v.weight.lora_a": torch.ones(2, 8)}
        written(path, {**pair, "blk.0.attn_v.weight.lora_b": torch.ones(8, 2)}, 4.0)
    content = bytearray(path.read_bytes())
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    else:
        for _ in range(data.draw(st.integers(1, 8))):
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    (tmp_path / "bad.gguf").write_bytes(content)
    try:
        adapter = Adapter.from_pretrained(tmp_path / "bad.gguf")
        for name in adapter.modules:
            adapter.stacks(name)
    except LoraMergeError as error:
        assert error.remedy


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = str(base(tmp_path / "base"))
    outs = []
    for seed in range(2):
        source = str(save_adapter(tmp_path / f"a{seed}", shapes=SHAPES, seed=seed))
        outs.append(str(tmp_path / f"g{seed}"))
        assert run(["convert", source, "--to", "gguf", "--base", model, "-o", outs[-1]]) == 0
    merged = str(tmp_path / "merged")
    assert run(["merge", *outs, "-o", merged, "--method", "linear"]) == 0
    assert (tmp_path / "merged" / "adapter.gguf").is_file()
    assert run(["info", merged, "--target", "llama.cpp"]) == 0
    assert "nothing" in capsys.readouterr().out.replace("reads it as it is", "nothing")
    assert run(["convert", merged, "--to", "peft", "--base", model, "-o", merged + "-peft"]) == 0
    direct = str(tmp_path / "direct")
    sources = [str(tmp_path / f"a{seed}") for seed in range(2)]
    assert run(["merge", *sources, "-o", direct, "--method", "linear"]) == 0
    one, other = (Adapter.from_pretrained(p) for p in (merged + "-peft", direct))
    for name in other.modules:
        torch.testing.assert_close(delta(one, name), delta(other, name), rtol=1e-4, atol=1e-5)
