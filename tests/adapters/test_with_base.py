"""Adapters beside their base: names and experts are checked, and what depends on it is read."""

from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import lora_merge
from builders import SHAPES, adapter_parts, delta, save_adapter, save_base, save_parts
from lora_merge.adapters.adapter import Adapter
from lora_merge.cli.app import run
from lora_merge.errors import AdapterError


def commands(*adapters: str, base: str, out: Path) -> dict[str, list[str]]:
    ends = ["--base", base]
    return {
        "merge": ["merge", *adapters, "-M", "mean", "-o", str(out / "merged"), *ends],
        "cluster": ["cluster", *adapters, "--rank", "2", "-o", str(out / "clusters"), *ends],
        "compare": ["compare", *adapters, *ends],
        "spectra": ["spectra", adapters[0], *ends],
        "info": ["info", adapters[0], *ends],
        "resize": ["resize", adapters[0], "--rank", "2", "-o", str(out / "small"), *ends],
        "convert": ["convert", adapters[0], "-o", str(out / "there"), *ends],
        "fuse": ["fuse", adapters[0], "-o", str(out / "fused"), *ends],
    }


NAMES = list(commands("", base="", out=Path()))


@pytest.mark.parametrize("command", NAMES)
def test_a_module_that_the_base_has_not_is_named(command, tmp_path: Path, capsys) -> None:
    base = save_base(tmp_path / "base")
    good = str(save_adapter(tmp_path / "good"))
    assert run(commands(good, good, base=base, out=tmp_path)[command]) == 0
    renamed = {n.replace("mlp", "ffn"): s for n, s in SHAPES.items()}
    bad = str(save_adapter(tmp_path / "bad", shapes=renamed))
    capsys.readouterr()
    made = sorted(tmp_path.iterdir())
    assert run(commands(bad, bad, base=base, out=tmp_path / "more")[command]) == 1
    assert "ffn.up_proj" in (said := capsys.readouterr().err)
    assert "mlp.up_proj" in said  # what comes near
    assert sorted(tmp_path.iterdir()) == made


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
@given(data=st.data())
def test_any_other_name_is_refused_and_any_rename_undone(data, tmp_path: Path) -> None:
    base = tmp_path / "base"
    if not base.exists():
        save_base(base)
    name = data.draw(st.sampled_from(sorted(SHAPES)))
    at = data.draw(st.integers(0, name.count(".")))
    parts = name.split(".")
    parts[at] += data.draw(st.sampled_from(["x", "_2", "0"]))
    other = ".".join(parts)
    folder = save_adapter(tmp_path / "a", shapes={other: SHAPES[name]})
    with pytest.raises(AdapterError) as refusal:
        lora_merge.open_adapter(folder, base=base)
    assert other in str(refusal.value) and "--rename" in refusal.value.remedy
    opened = lora_merge.open_adapter(folder, base=base, rename=[f"{other}={name}"])
    assert list(opened.modules) == [name]


def test_names_before_and_after_4_52_are_one(tmp_path: Path) -> None:
    old = {f"language_model.{name}": shape for name, shape in SHAPES.items()}
    new = {name.replace("model.", "model.language_model.", 1): s for name, s in SHAPES.items()}
    for held, asked in ((old, new), (new, old)):
        folder = tmp_path / next(iter(held)).split(".")[0]
        base = save_base(folder, held)
        adapter = save_adapter(tmp_path / "a", shapes=asked)
        assert len(lora_merge.open_adapter(adapter, base=base).modules) == len(SHAPES)


@pytest.mark.parametrize("stacked", [True, False])
def test_experts_that_the_base_has_not_are_refused(stacked: bool, tmp_path: Path) -> None:
    stem = "model.layers.0.mlp.experts"
    held: dict[str, tuple[int, ...]] = {f"{stem}.down_proj": (4, 16, 10)}
    if not stacked:
        held = {f"{stem}.{e}.down_proj": (16, 10) for e in range(4)}
    base = save_base(tmp_path / "base", held)
    apart = save_adapter(tmp_path / "apart", shapes={f"{stem}.3.down_proj": (16, 10)})
    assert lora_merge.open_adapter(apart, base=base).modules
    more = save_adapter(tmp_path / "more", shapes={f"{stem}.7.down_proj": (16, 10)})
    with pytest.raises(AdapterError, match="expert 7, the base has 4"):
        lora_merge.open_adapter(more, base=base)
    with pytest.raises(AdapterError, match="expert 7, the base has 4"):
        lora_merge.merge([apart, more], base=base)


@pytest.mark.parametrize(("kind", "turned"), [("qwen3_moe", True), ("gpt_oss", False)])
def test_the_type_of_model_tells_how_old_peft_stored_square_experts(kind, turned, tmp_path) -> None:
    """PEFT 0.18 read (E, m, n) as (E, in, out), which GPT-OSS stores, and others do not."""
    experts, r, size = 2, 3, 8
    stem = "base_model.model.model.layers.0.mlp.experts"
    a, b = torch.randn(experts * r, size), torch.randn(size, r * experts)
    config, _ = adapter_parts(
        r=r, target_modules=[], target_parameters=["mlp.experts.down_proj"], peft_version="0.18.1"
    )
    tensors = {f"{stem}.lora_A.weight": a, f"{stem}.lora_B.weight": b}
    folder = save_parts(tmp_path / "a", config, tensors)
    with pytest.raises(AdapterError) as refusal:
        Adapter.from_pretrained(folder)
    assert "--base" in refusal.value.remedy
    held = {"model.layers.0.mlp.experts.down_proj": (experts, size, size)}
    base = save_base(tmp_path / "base", held, model_type=kind)
    adapter = lora_merge.open_adapter(folder, base=base)
    stacks = adapter.stacks("model.layers.0.mlp.experts.down_proj")
    for e, stack in enumerate(stacks):
        stored = b.view(size, r, experts)[:, :, e] @ a.view(experts, r, size)[e]
        want = 8 / 3 * (stored.mT if turned else stored)
        torch.testing.assert_close(stack.delta(), want, rtol=1e-4, atol=1e-5)


def test_forms_that_need_the_base_go_through_every_command(tmp_path: Path, capsys) -> None:
    """A PiSSA adapter's delta is s B A less what was taken from W; every command takes it so."""
    base = save_base(tmp_path / "base")
    pissa = str(save_adapter(tmp_path / "pissa", init_lora_weights="pissa"))
    plain = str(save_adapter(tmp_path / "plain"))
    assert run(["merge", pissa, plain, "-o", str(tmp_path / "no")]) == 1
    assert "--base DIR" in capsys.readouterr().err
    for arguments in commands(pissa, plain, base=base, out=tmp_path).values():
        assert run(arguments) == 0
    opened = lora_merge.open_adapter(pissa, base=base)
    merged = Adapter.from_pretrained(tmp_path / "merged")
    other = Adapter.from_pretrained(plain)
    for name in SHAPES:
        want = (delta(opened, name) + delta(other, name)) / 2
        torch.testing.assert_close(delta(merged, name), want, rtol=1e-4, atol=1e-4)
    assert f"base: {base}" in (tmp_path / "merged" / "lora_merge.yaml").read_text()
    again = str(tmp_path / "again")
    assert run(["run", str(tmp_path / "merged" / "lora_merge.yaml"), "-o", again]) == 0
    one, two = (Path(p) / "adapter_model.safetensors" for p in (tmp_path / "merged", again))
    assert one.read_bytes() == two.read_bytes()


@pytest.mark.parametrize("command", ["merge", "compare", "spectra", "resize", "convert"])
def test_what_was_trained_beside_the_adapter_is_told(command, tmp_path: Path, capsys) -> None:
    base = save_base(tmp_path / "base")
    adapter, other = (str(save_adapter(tmp_path / name, seed=i)) for i, name in enumerate("ab"))
    (tmp_path / "a" / "value_head.safetensors").write_bytes(b"not read")
    assert run(commands(adapter, other, base=base, out=tmp_path)[command]) == 0
    assert "value_head.safetensors lies beside the adapter" in capsys.readouterr().err
