"""X-LoRA and MeteoRA checkpoints in, folders and static adapters out."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft_xlora import ours_from, peft_xlora
from safetensors.torch import load_file, save_file
from tiny import experts_for, llama, saved_experts, shapes_of, tokens

from builders import SHAPES, make_adapter
from lora_merge.errors import AdapterError, MethodError, OutputError
from lora_merge.mixture.formats.meteora import import_meteora
from lora_merge.mixture.formats.plain import export_experts, export_static
from lora_merge.mixture.formats.xlora import export_xlora, import_xlora
from lora_merge.mixture.mixture import Mixture
from lora_merge.mixture.runtime.attach import load_mixture
from lora_merge.mixture.training.base_model import layer_order

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*is_gradient_checkpointing:FutureWarning",
    "ignore:.*enable_softmax_topk:UserWarning",
    "ignore:Unable to fetch remote file:UserWarning",
    "ignore:Could not find a config file:UserWarning",
)


def logits(mixture: Mixture) -> torch.Tensor:
    model = llama()
    load_mixture(model, mixture)
    return model(tokens()).logits


def order_of(modules: list[str]) -> list[str]:
    """As PEFT walks a Llama."""
    return [name for name, _ in llama().named_modules() if name in set(modules)]


def as_peft_019(mixture: Mixture, paths: list[str], folder: Path, **config: object) -> Path:
    """Write what PEFT 0.19 wrote, by hand."""
    folder.mkdir()
    depth, count = mixture.spec.depth, len(paths)
    order = order_of(mixture.modules)
    tensors = {}
    for index in range(depth):
        weight = mixture.gate[f"classifier.{index}.weight"]
        bias = mixture.gate[f"classifier.{index}.bias"]
        if index == depth - 1 and len(weight) > count:
            places = [mixture.modules.index(name) for name in order]
            weight = torch.cat([weight[p * count : (p + 1) * count] for p in places])
            bias = torch.cat([bias[p * count : (p + 1) * count] for p in places])
        stem = f"base_model.internal_xlora_classifier.layers.{index * 3}"
        tensors |= {f"{stem}.weight": weight.clone(), f"{stem}.bias": bias.clone()}
    save_file(tensors, folder / "adapter_model.safetensors")
    raw = {
        "peft_type": "XLORA", "hidden_size": 32, "xlora_depth": depth, "xlora_size": 24,
        "adapters": {f"name{i}": "gone" for i in range(count)}, **config,
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(raw))
    for index, path in enumerate(paths):
        shutil.copytree(path, folder / str(index))
    return folder


@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("layerwise", [True, False])
def test_an_old_peft_checkpoint_gives_pefts_logits(
    tmp_path: Path, depth: int, layerwise: bool
) -> None:
    paths = saved_experts(tmp_path, llama())
    config = {"layerwise_scalings": layerwise, "xlora_depth": depth, "xlora_size": 24}
    theirs = peft_xlora(paths, **config, softmax_temperature=0.5)
    granularity = "module" if layerwise else "model"
    mixture = ours_from(
        theirs, paths, granularity=granularity, depth=depth, width=24, temperature=0.5
    )
    folder = as_peft_019(
        mixture, paths, tmp_path / "old", layerwise_scalings=layerwise, softmax_temperature=0.5
    )
    got = import_xlora(folder, order=order_of(mixture.modules))
    assert got.names == ["name0", "name1", "name2"]
    expected = theirs(input_ids=tokens()).logits
    torch.testing.assert_close(logits(got), expected, rtol=1e-4, atol=1e-4)
    if layerwise:
        with pytest.raises(MethodError, match="numbered as the base model's class"):
            import_xlora(folder)


@pytest.mark.parametrize("depth", [1, 2])
def test_a_checkpoint_that_lost_its_gate_is_refused(tmp_path: Path, depth: int) -> None:
    """What PEFT 0.20 and later really write."""
    paths = saved_experts(tmp_path, llama())
    theirs = peft_xlora(paths, xlora_depth=depth, xlora_size=24)
    theirs.save_pretrained(tmp_path / "new")
    left = load_file(tmp_path / "new" / "adapter_model.safetensors")
    if any("layers.0.weight" in name for name in left):
        pytest.skip("this PEFT keeps the gate")
    with pytest.raises(AdapterError, match=f"not complete: 0 of {depth} layers") as told:
        import_xlora(tmp_path / "new")
    assert "PEFT 0.20 and later lose it" in told.value.remedy


def test_the_original_packages_layout(tmp_path: Path) -> None:
    paths = saved_experts(tmp_path, llama())
    mixture = Mixture(paths, "xlora", granularity="model", depth=2, width=24)
    folder = tmp_path / "original"
    folder.mkdir()
    gate = mixture.gate
    save_file(
        {
            "inner.0.weight": gate["classifier.0.weight"],
            "inner.0.bias": gate["classifier.0.bias"],
            "last.weight": gate["classifier.1.weight"],
            "last.bias": gate["classifier.1.bias"],
        },
        folder / "xlora_classifier.safetensors",
    )
    raw = {
        "hidden_size": 32, "xlora_depth": 2, "xlora_size": 24, "adapters": ["a", "b", "c"],
        "base_model_id": "x",
    }  # fmt: skip
    (folder / "xlora_config.json").write_text(json.dumps(raw))
    got = import_xlora(folder, experts=paths)
    torch.testing.assert_close(logits(got), logits(mixture))
    stored = folder / "xlora_classifier.safetensors"
    torch.save(load_file(stored), folder / "xlora_classifier.pt")
    stored.rename(tmp_path / "apart")
    with pytest.raises(AdapterError, match="is a pickle") as told:
        import_xlora(folder, experts=paths)
    assert "--allow-pickle" in told.value.remedy
    again = import_xlora(folder, experts=paths, allow_pickle=True)
    assert all(torch.equal(t, got.gate[name]) for name, t in again.gate.items())
    torch.save({"inner.0.weight": Path(folder)}, folder / "xlora_classifier.pt")  # not only tensors
    with pytest.raises(AdapterError, match="no plain dictionary of tensors"):
        import_xlora(folder, experts=paths, allow_pickle=True)
    (tmp_path / "apart").rename(stored)
    (folder / "xlora_config.json").write_text(json.dumps({**raw, "scaling_pass_value": 0.7}))
    with pytest.raises(MethodError, match=r"scaling_pass_value is 0\.7"):
        import_xlora(folder, experts=paths)
    with pytest.raises(AdapterError, match="3 experts, 2 given"):
        import_xlora(folder, experts=paths[:2])


def test_layer_order_needs_only_the_config(tmp_path: Path) -> None:
    model = llama()
    model.config.save_pretrained(tmp_path)
    names = sorted(shapes_of(model))
    assert layer_order(str(tmp_path), names) == order_of(names) != names


def test_exported_xlora_loads_in_peft(tmp_path: Path) -> None:
    from peft import PeftModel

    paths = saved_experts(tmp_path, llama())
    mixture = Mixture(paths, "xlora", depth=2, width=24, top_k=2)
    for name in mixture.gate:
        mixture.gate[name] = mixture.gate[name] * 9
    export_xlora(mixture, tmp_path / "out", order_of(mixture.modules))
    again = import_xlora(tmp_path / "out", order=order_of(mixture.modules))
    torch.testing.assert_close(logits(again), logits(mixture))
    base = llama()
    base.config.use_cache = False
    theirs = PeftModel.from_pretrained(base, str(tmp_path / "out")).eval()
    got = theirs(input_ids=tokens()).logits
    torch.testing.assert_close(got, logits(mixture), rtol=1e-4, atol=1e-4)
    with pytest.raises(MethodError, match="no X-LoRA gate"):
        export_xlora(Mixture(paths, "arrow"), tmp_path / "no", [])


def test_meteora_checkpoints(tmp_path: Path) -> None:
    model = llama()
    paths = saved_experts(tmp_path, model, (4, 2, 3))
    mixture = Mixture(paths, "meteora", top_k=2, temperature=1.5)
    tensors = {}
    for name in mixture.modules:
        pairs = [e.adapter.read(name) for e in mixture.experts]
        tensors[f"{name}.moe_gate.weight"] = mixture.gate[f"{name}.weight"]
        tensors[f"{name}.lora_A.weight"] = torch.cat([a for a, _ in pairs])
        tensors[f"{name}.lora_B.weight"] = torch.cat([b for _, b in pairs], dim=1)
    tensors["model.norm.weight"] = torch.ones(32)
    save_file(tensors, tmp_path / "model.safetensors")
    got = import_meteora(tmp_path / "model.safetensors", paths, temperature=1.5)
    torch.testing.assert_close(logits(got), logits(mixture))
    folder = got.save_pretrained(tmp_path / "mix")
    saved = logits(Mixture.from_pretrained(folder))
    torch.testing.assert_close(saved, logits(mixture), rtol=1e-5, atol=1e-5)
    with pytest.raises(AdapterError, match=r"3 experts of 9 ranks together.*\[2, 4, 3\]|ranks \["):
        import_meteora(tmp_path / "model.safetensors", paths[:2])
    with pytest.raises(AdapterError, match="no moe_gate"):
        import_meteora(Path(paths[0]) / "adapter_model.safetensors", paths)


def test_static_export_is_the_constant_gate(tmp_path: Path) -> None:
    from peft import PeftModel

    mixture = Mixture(experts_for(llama()), "constant", weights=(0.5, -0.2, 0.9))
    assert export_static(mixture, tmp_path / "exact") == 0.0
    theirs = PeftModel.from_pretrained(llama(), str(tmp_path / "exact")).eval()
    torch.testing.assert_close(theirs(tokens()).logits, logits(mixture), rtol=1e-4, atol=1e-4)
    error = export_static(mixture, tmp_path / "cut", rank=5)
    lost = total = 0.0
    for name in mixture.modules:
        whole = sum(
            w * e.adapter.modules[name].scaling * b.double() @ a.double()
            for w, e in zip((0.5, -0.2, 0.9), mixture.experts, strict=True)
            if name in e.adapter.modules
            for a, b in [e.adapter.read(name)]
        )
        values = torch.linalg.svdvals(whole)
        lost, total = lost + (values[5:] ** 2).sum(), total + (values**2).sum()
    assert error == pytest.approx(float((lost / total) ** 0.5), rel=1e-4)


def test_static_export_takes_measured_weights(tmp_path: Path) -> None:
    model = llama()
    mixture = Mixture(experts_for(model), "arrow")
    handle = load_mixture(model, mixture)
    with handle.watch() as usage:
        model(tokens())
    export_static(mixture, tmp_path / "mean", weights=usage.mean_weights())
    name = "model.layers.0.mlp.up_proj"
    from lora_merge.adapters.adapter import Adapter

    written = Adapter.from_pretrained(tmp_path / "mean")
    a, b = written.read(name)
    expected = sum(
        float(w)
        * e.adapter.modules[name].scaling
        * e.adapter.read(name)[1]
        @ e.adapter.read(name)[0]
        for w, e in zip(usage.mean_weights()[name], mixture.experts, strict=True)
        if name in e.adapter.modules
    )
    torch.testing.assert_close(
        b @ a * written.modules[name].scaling, expected, rtol=1e-4, atol=1e-5
    )


def test_an_export_does_not_replace_what_it_is_made_from(tmp_path: Path) -> None:
    Mixture(saved_experts(tmp_path, llama()), "xlora").save_pretrained(tmp_path / "mix")
    mixture = Mixture.from_pretrained(tmp_path / "mix")
    for export in (
        export_static,
        export_experts,
        lambda m, folder, force: export_xlora(m, folder, m.modules, force=force),
    ):
        with pytest.raises(OutputError, match="holds an input"):
            export(mixture, tmp_path / "mix", force=True)
    assert Mixture.from_pretrained(tmp_path / "mix").names == mixture.names


def test_experts_whose_folders_would_clash_are_named(tmp_path: Path) -> None:
    paths = saved_experts(tmp_path, llama())[:2]
    with pytest.raises(MethodError, match=r"'a b' and 'a-b'"):
        export_experts(Mixture(paths, "arrow", names=["a b", "a-b"]), tmp_path / "experts")


def test_measured_weights_need_not_cover_general_knowledge_alone(tmp_path: Path) -> None:
    one, two = (make_adapter(name, seed=seed) for seed, name in enumerate(("one", "two")))
    wide = make_adapter("wide", shapes={**SHAPES, "model.layers.0.mlp.extra": (5, 16)})
    mixture = Mixture([one, two], "arrow", general=[wide])
    weights = dict.fromkeys(SHAPES, torch.tensor([0.5, 0.5]))
    assert export_static(mixture, tmp_path / "static", weights=weights) == 0.0


def test_experts_come_out_as_they_went_in(tmp_path: Path) -> None:
    paths = saved_experts(tmp_path, llama())
    folders = export_experts(Mixture(paths, "arrow"), tmp_path / "experts")
    for path, folder in zip(paths, folders, strict=True):
        name = "adapter_model.safetensors"
        assert (folder / name).read_bytes() == (Path(path) / name).read_bytes()
