"""Files for image and video models: what their names and headers mean, and what is written."""

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from lora_merge import merge
from lora_merge.adapters.adapter import Adapter, build_adapter
from lora_merge.adapters.alignment import align, read_stacks
from lora_merge.adapters.config import AdapterConfig
from lora_merge.cli.app import run
from lora_merge.errors import AdapterError
from lora_merge.files.tensor_file import TensorDict

MODULES = {"down_blocks.0.attn.to_q": (12, 8), "mid_block.conv": (10, 6, 3, 3)}


def factors(seed: int = 0, rank: int = 4) -> dict[str, tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(seed)
    return {
        name: (
            torch.randn(rank, *shape[1:], generator=g),
            torch.randn(shape[0], rank, *[1] * (len(shape) - 2), generator=g),
        )
        for name, shape in MODULES.items()
    }


# dialect, file → (name of A, name of B, name of alpha) of a module
SPELLINGS = {
    "kohya": ("lora_unet_{f}.lora_down.weight", "lora_unet_{f}.lora_up.weight"),
    "lycoris": ("lycoris_{f}.lora_down.weight", "lycoris_{f}.lora_up.weight"),
    "diffusers": ("unet.{n}.lora_A.weight", "unet.{n}.lora_B.weight"),
    "older-diffusers": ("unet.{n}.lora.down.weight", "unet.{n}.lora.up.weight"),
    "linear-layer": (
        "unet.{n}.lora_linear_layer.down.weight",
        "unet.{n}.lora_linear_layer.up.weight",
    ),
    "comfyui": ("diffusion_model.{n}.lora_A.weight", "diffusion_model.{n}.lora_B.weight"),
    "default": (
        "diffusion_model.{n}.lora_A.default.weight",
        "diffusion_model.{n}.lora_B.default.weight",
    ),
    "without-weight": ("diffusion_model.{n}.lora_A", "diffusion_model.{n}.lora_B"),
}


def tensors(spelling: str, seed: int = 0, alpha: float | None = 2.0) -> dict[str, Tensor]:
    found = {}
    for name, pair in factors(seed).items():
        flat = name.replace(".", "_")
        keys = [key.format(n=name, f=flat) for key in SPELLINGS[spelling]]
        found |= dict(zip(keys, pair, strict=True))
        if alpha is not None:
            stem = keys[0].partition(".lora")[0]
            found[f"{stem}.alpha"] = torch.tensor(alpha)
    return found


def opened(found: dict[str, Tensor], config: AdapterConfig | None = None) -> Adapter:
    return build_adapter("mine", config, TensorDict(found))


def deltas(adapter: Adapter) -> list[Tensor]:
    alignment = align([adapter])
    return [next(read_stacks(alignment, m)).delta() for m in alignment.modules]


def expected(seed: int = 0, scaling: float = 0.5) -> list[Tensor]:
    return [scaling * b.flatten(1) @ a.flatten(1) for a, b in factors(seed).values()]


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_is_the_same_delta(spelling: str) -> None:
    adapter = opened(tensors(spelling))
    family = {"lycoris": "kohya", "older-diffusers": "diffusers", "linear-layer": "diffusers"}
    assert adapter.dialect == family.get(spelling, "comfyui" if "-" in spelling else spelling) or (
        spelling == "default" and adapter.dialect == "comfyui"
    )
    torch.testing.assert_close(deltas(adapter), expected())


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("alpha", [None, 0.0])
def test_without_an_alpha_the_scaling_is_1(spelling: str, alpha: float | None) -> None:
    torch.testing.assert_close(
        deltas(opened(tensors(spelling, alpha=alpha))), expected(scaling=1.0)
    )


def test_an_old_attention_processor_is_its_projection() -> None:
    a, b = factors()["down_blocks.0.attn.to_q"]
    stem = "unet.down.attn1.processor"
    found = {f"{stem}.to_q_lora.down.weight": a, f"{stem}.to_q_lora.up.weight": b}
    found |= {f"{stem}.to_out_lora.down.weight": a, f"{stem}.to_out_lora.up.weight": b}
    assert list(opened(found).modules) == ["unet.down.attn1.to_out.0", "unet.down.attn1.to_q"]


def saved(path: Path, found: dict[str, Tensor], metadata: dict[str, str]) -> Adapter:
    save_file(found, path, metadata=metadata)
    return Adapter.from_pretrained(path)


def test_the_header_says_the_scaling(tmp_path: Path) -> None:
    found = tensors("diffusers", alpha=None)
    config = {"unet.r": 4, "unet.lora_alpha": 6, "unet.alpha_pattern": {"mid_block.conv": 10}}
    want = [s * 2 * d for s, d in zip((1.5, 2.5), expected(), strict=True)]
    whole = {"format": "pt", "lora_adapter_metadata": json.dumps(config)}
    torch.testing.assert_close(deltas(saved(tmp_path / "a.safetensors", found, whole)), want)
    flat = {k: v if isinstance(v, str) else json.dumps(v) for k, v in config.items()}
    torch.testing.assert_close(deltas(saved(tmp_path / "b.safetensors", found, flat)), want)


def test_the_command_lines_alpha_counts_where_the_file_has_none() -> None:
    config = AdapterConfig(r=None, lora_alpha=8)
    without = deltas(opened(tensors("diffusers", alpha=None), config))
    torch.testing.assert_close(without, expected(scaling=2.0))
    torch.testing.assert_close(deltas(opened(tensors("diffusers"), config)), expected())


def test_an_alpha_in_the_header_that_no_reader_uses_is_told(tmp_path: Path) -> None:
    trained = {"ss_network_alpha": "1", "ss_network_dim": "4"}
    adapter = saved(tmp_path / "a.safetensors", tensors("kohya", alpha=None), trained)
    torch.testing.assert_close(deltas(adapter), expected(scaling=1.0))
    assert any("trained with alpha 1" in note for note in adapter.notes)


def test_a_language_models_bare_names_are_not_taken_for_a_transformers() -> None:
    found = {f"transformer.h.0.attn.c_attn.lora_{h}.weight": torch.ones(4, 4) for h in "AB"}
    with pytest.raises(AdapterError, match="scaling is unknown"):
        opened(found)


@pytest.mark.parametrize(
    ("leaf", "why"),
    [("dora_scale", "DoRA"), ("magnitude", "DoRA"), ("reshape_weight", "control LoRA")],
)
@pytest.mark.parametrize("spelling", ["kohya", "diffusers", "comfyui"])
def test_what_changes_the_meaning_is_refused(spelling: str, leaf: str, why: str) -> None:
    found = tensors(spelling)
    stem = min(found).partition(".lora")[0]
    found[f"{stem}.{leaf}"] = torch.ones(12)
    with pytest.raises(AdapterError, match=why):
        opened(found)


LEAVES = st.sampled_from(
    ["lora_C.weight", "diff", "oft_blocks", "lora_gate.weight", "gamma", "hada_w1_a", "x.weight"]
)


@pytest.mark.parametrize("spelling", SPELLINGS)
@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data(), leaf=LEAVES)
def test_every_tensor_is_claimed_or_named(spelling: str, data: st.DataObject, leaf: str) -> None:
    found = tensors(spelling)
    key = data.draw(st.sampled_from(sorted(found)))
    stem = key.removesuffix(".alpha").partition(".lora")[0]
    with pytest.raises(AdapterError) as caught:
        opened({**found, f"{stem}.{leaf}": torch.ones(3, 3)})
    assert stem.removeprefix("unet.") in str(caught.value) and caught.value.remedy
    rest = {k: t for k, t in found.items() if k != key}
    if key.endswith(".alpha"):
        assert opened(rest).modules[stem].scaling == 1
        return
    with pytest.raises(AdapterError):
        opened(rest)
    with pytest.raises(AdapterError):
        opened({**rest, key + "_x": found[key]})


@pytest.mark.parametrize("spelling", ["kohya", "diffusers", "comfyui"])
def test_a_merge_is_written_as_its_sources_were(spelling: str, tmp_path: Path) -> None:
    sources = []
    for seed in (0, 1):
        found = tensors(spelling, seed)
        found["lora_unet_norm.w_norm" if spelling == "kohya" else "unet.norm.diff"] = torch.full(
            (8,), float(seed)
        )
        sources.append(
            saved(tmp_path / f"{seed}.safetensors", found, {"ss_base_model_version": "sd_v1"})
        )
    merged = merge(sources, method="cat")
    assert merged.dialect == sources[0].dialect
    merged.save_pretrained(tmp_path / "out")
    (file,) = (tmp_path / "out").glob("*.safetensors")
    again = Adapter.from_pretrained(tmp_path / "out")
    assert again.dialect == merged.dialect and not (tmp_path / "out/adapter_config.json").exists()
    want = [a + b for a, b in zip(expected(0), expected(1), strict=True)]
    torch.testing.assert_close(deltas(again), want, rtol=1e-5, atol=1e-5)
    (extra,) = again.extras
    torch.testing.assert_close(again.read_extra(extra), torch.full((8,), 0.5))
    assert file.name == {"diffusers": "pytorch_lora_weights.safetensors"}.get(
        spelling, "lora.safetensors"
    )


def test_sd_scripts_hashes_are_those_of_the_file(tmp_path: Path) -> None:
    big = {
        f"lora_unet_x{i}.lora_{h}.weight": torch.randn(*s)
        for i in range(2)
        for h, s in (("down", (32, 3000)), ("up", (3000, 32)))
    }
    saved(tmp_path / "a.safetensors", big, {}).save_pretrained(tmp_path / "out")
    path = tmp_path / "out" / "lora.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    assert metadata["sshs_model_hash"] == hashlib.sha256(data[8 + length :]).hexdigest()
    assert metadata["ss_network_dim"] == metadata["ss_network_alpha"] == "32"
    # The older hash is that of the file as it was before the hashes were put into it.
    bare = {k: v for k, v in metadata.items() if not k.startswith("sshs_")}
    header = {**json.loads(data[8 : 8 + length]), "__metadata__": bare}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    before = struct.pack("<Q", len(text)) + text + data[8 + length :]
    assert metadata["sshs_legacy_hash"] == hashlib.sha256(before[0x100000:0x110000]).hexdigest()[:8]
    assert {k: t.shape for k, t in load_file(path).items() if "alpha" not in k} == {
        k: t.shape for k, t in big.items()
    }


def test_two_spellings_do_not_merge_to_a_union(tmp_path: Path) -> None:
    one = saved(tmp_path / "a.safetensors", tensors("kohya"), {})
    two = saved(tmp_path / "b.safetensors", tensors("diffusers"), {})
    with pytest.raises(AdapterError, match="names its modules as"):
        merge([one, two], method="cat")


def test_reading_what_was_written_is_the_identity(tmp_path: Path) -> None:
    for spelling in ("kohya", "diffusers", "comfyui"):
        first: Any = saved(tmp_path / f"{spelling}.safetensors", tensors(spelling), {})
        first.save_pretrained(tmp_path / spelling)
        again = Adapter.from_pretrained(tmp_path / spelling)
        assert list(again.modules) == list(first.modules)
        torch.testing.assert_close(deltas(again), deltas(first), rtol=1e-6, atol=1e-6)
        again.save_pretrained(tmp_path / f"{spelling}2")
        assert load_file(*(tmp_path / f"{spelling}2").glob("*.safetensors")).keys() == (
            load_file(*(tmp_path / spelling).glob("*.safetensors")).keys()
        )


def flux_file(seed: int, rank: int, width: int = 8) -> dict[str, Tensor]:
    """sd-scripts' `split_qkv`: three LoRAs side by side in one fused projection, and one other."""
    g = torch.Generator().manual_seed(seed)
    stem = "lora_unet_double_blocks_0_img_attn_"
    ups = [torch.randn(width, rank, generator=g) for _ in range(3)]
    return {
        f"{stem}qkv.lora_down.weight": torch.randn(3 * rank, width, generator=g),
        f"{stem}qkv.lora_up.weight": torch.block_diag(*ups),
        f"{stem}qkv.alpha": torch.tensor(2.0),
        f"{stem}proj.lora_down.weight": torch.randn(rank, width, generator=g),
        f"{stem}proj.lora_up.weight": torch.randn(width, rank, generator=g),
        f"{stem}proj.alpha": torch.tensor(2.0),
    }


@pytest.mark.parametrize("method", ["cat", "svd"])
def test_a_merge_of_fused_blocks_is_exact_and_told(method: str, tmp_path: Path) -> None:
    files = [flux_file(seed, rank) for seed, rank in ((1, 2), (2, 4))]
    for number, file in enumerate(files):
        save_file(file, tmp_path / f"{number}.safetensors")
    sources = [tmp_path / "0.safetensors", tmp_path / "1.safetensors"]
    adapter = Adapter.from_pretrained(sources[0])
    assert any("one LoRA for each of q, k and v" in note for note in adapter.notes)
    merged = merge(sources, method=method, rank=None if method == "cat" else 8, scale=1)
    merged.save_pretrained(tmp_path / "out")
    written = load_file(tmp_path / "out" / "lora.safetensors")
    stem = "lora_unet_double_blocks_0_img_attn_qkv"
    wanted = sum(
        2.0 / len(f[f"{stem}.lora_down.weight"])
        * f[f"{stem}.lora_up.weight"] @ f[f"{stem}.lora_down.weight"]
        for f in files
    )  # fmt: skip
    down, up = written[f"{stem}.lora_down.weight"], written[f"{stem}.lora_up.weight"]
    found = float(written[f"{stem}.alpha"]) / len(down) * up @ down
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    pytest.importorskip("diffusers", reason="pip install 'lora-merge[oracles]'")
    from lora_merge.reshape.diffusers_names import through_diffusers

    parts = through_diffusers(Adapter.from_pretrained(tmp_path / "out"), "Flux")
    for number, part in enumerate(("to_q", "to_k", "to_v")):
        (stack,) = parts.stacks(f"transformer.transformer_blocks.0.attn.{part}")
        rows = wanted[8 * number : 8 * (number + 1)]
        torch.testing.assert_close(stack.delta(), rows, rtol=1e-4, atol=1e-4)


def test_text_encoder_and_unet_have_weights_of_their_own(tmp_path: Path) -> None:
    """As two multipliers of one file in other tools: -w apart for lora_te and lora_unet."""
    files = []
    for seed in (1, 2):
        a, b = factors(seed)["down_blocks.0.attn.to_q"]
        found = {}
        for stem in ("lora_te1_text_model_q", "lora_unet_down_q"):
            found |= {f"{stem}.lora_down.weight": a.clone(), f"{stem}.lora_up.weight": b.clone()}
        save_file(found, tmp_path / f"{seed}.safetensors")
        files.append(str(tmp_path / f"{seed}.safetensors"))
    both = [
        "[{filter: lora_te, value: 0.5}, {value: 2}]",
        "[{filter: lora_te, value: 0}, {value: 1}]",
    ]
    command = ["merge", *files, "-M", "cat", "--scale", "1", "-o", str(tmp_path / "out")]
    assert run([*command, "-w", both[0], "-w", both[1]]) == 0
    merged = Adapter.from_pretrained(tmp_path / "out")
    one, two = (expected(seed, 1.0)[0] for seed in (1, 2))
    (text,), (unet,) = (merged.stacks(n) for n in ("lora_te1_text_model_q", "lora_unet_down_q"))
    torch.testing.assert_close(text.delta(), 0.5 * one, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(unet.delta(), 2 * one + two, rtol=1e-4, atol=1e-4)
