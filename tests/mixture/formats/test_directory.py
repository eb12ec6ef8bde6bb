"""Saving and loading: everything comes back, and nothing is ever made up."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import experts_for, llama, saved_experts, tokens

from lora_merge.errors import AdapterError, AlignmentError, MethodError, OutputError, SourceError
from lora_merge.mixture.gates.gate import PRESETS
from lora_merge.mixture.mixture import Mixture
from lora_merge.mixture.runtime.attach import load_mixture

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


def trained_looking(experts: list, preset: str) -> Mixture:
    settings = {"weights": (0.1, 0.7, -0.4)} if preset == "constant" else {}
    mixture = Mixture(experts, preset, **settings)
    random = torch.Generator().manual_seed(1)
    for name, tensor in mixture.gate.items():
        mixture.gate[name] = torch.randn(tensor.shape, generator=random)
    return mixture


@pytest.mark.parametrize("preset", list(PRESETS))
@pytest.mark.parametrize("on_disk", [True, False], ids=["files", "memory"])
def test_saving_and_loading_gives_the_same_logits(
    tmp_path: Path, preset: str, on_disk: bool
) -> None:
    model = llama()
    experts = saved_experts(tmp_path, model) if on_disk else experts_for(model)
    mixture = trained_looking(experts, preset)
    load_mixture(model, mixture)
    if preset == "request":
        model.mixture.set_gate(requests=["expert1", "expert2"])
    expected = model(tokens()).logits
    model.mixture.detach()
    folder = mixture.save_pretrained(tmp_path / "mixture")
    again = Mixture.from_pretrained(folder)
    assert again.spec == mixture.spec and again.names == mixture.names
    assert all(torch.equal(again.gate[k], mixture.gate[k]) for k in mixture.gate)
    load_mixture(model, folder)
    if preset == "request":
        model.mixture.set_gate(requests=["expert1", "expert2"])
    if on_disk:
        assert torch.equal(model(tokens()).logits, expected)
    else:  # an adapter without a file is written with its scaling folded into the factors
        torch.testing.assert_close(model(tokens()).logits, expected, rtol=1e-5, atol=1e-5)


def test_experts_are_plain_peft_adapters_byte_for_byte(tmp_path: Path) -> None:
    from peft import PeftModel

    model = llama()
    paths = saved_experts(tmp_path, model)
    folder = Mixture(paths, "arrow").save_pretrained(tmp_path / "mixture")
    for path, copy in zip(paths, sorted((folder / "experts").iterdir()), strict=True):
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            assert (Path(path) / name).read_bytes() == (copy / name).read_bytes()
    PeftModel.from_pretrained(model, str(copy))
    with pytest.raises((KeyError, ValueError)):  # stock PEFT refuses the mixture, loudly
        PeftModel.from_pretrained(llama(), str(folder))


def test_saving_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    paths = saved_experts(tmp_path, llama())
    first, second = (
        Mixture(paths, "xlora", seed=4).save_pretrained(tmp_path / name) for name in ("a", "b")
    )
    for path in first.rglob("*"):
        if path.is_file():
            assert path.read_bytes() == (second / path.relative_to(first)).read_bytes()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Mixture(saved_experts(tmp_path, llama()), "meteora").save_pretrained(tmp_path / "mix")


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_gate_that_lost_a_tensor_is_refused_not_filled_up(folder: Path) -> None:
    gate = load_file(folder / "gate.safetensors")
    lost = sorted(gate)[0]
    save_file({k: v for k, v in gate.items() if k != lost}, folder / "gate.safetensors")
    with pytest.raises(AdapterError, match="hash differs"):
        Mixture.from_pretrained(folder)
    with pytest.raises(MethodError, match=f"{lost} is missing"):
        Mixture.from_pretrained(folder, verify=False)
    gate[lost] = gate[lost][:1]
    save_file({**gate, "stray": torch.ones(1)}, folder / "gate.safetensors")
    with pytest.raises(MethodError, match=r"stray is not part.*\n.*\[1, 48\], not \[3, 48\]"):
        Mixture.from_pretrained(folder, verify=False)
    gate[lost] = torch.full((3, 48), torch.nan)
    save_file(gate, folder / "gate.safetensors")
    with pytest.raises(MethodError, match="NaN"):
        Mixture.from_pretrained(folder, verify=False)


def test_a_changed_or_missing_expert_is_named(folder: Path) -> None:
    victim = folder / "experts" / "01-expert1" / "adapter_model.safetensors"
    tensors = load_file(victim)
    save_file({k: v + 1 for k, v in tensors.items()}, victim, metadata={"format": "pt"})
    with pytest.raises(AdapterError, match="expert expert1 is not the file that was saved"):
        Mixture.from_pretrained(folder)
    victim.unlink()
    with pytest.raises(AdapterError, match="expert expert1 is missing"):
        Mixture.from_pretrained(folder)


def test_configs_from_elsewhere_are_refused(folder: Path, tmp_path: Path) -> None:
    config = folder / "mixture_config.json"
    raw = json.loads(config.read_text())
    edit(config, schema_version=2)
    with pytest.raises(AdapterError, match="schema_version 2"):
        Mixture.from_pretrained(folder)
    edit(config, schema_version=1, gate={**raw["gate"], "wings": 2})
    with pytest.raises(MethodError, match="wings"):
        Mixture.from_pretrained(folder)
    edit(config, gate={**raw["gate"], "value": "hard"})
    with pytest.raises(MethodError, match="value is 'hard'"):
        Mixture.from_pretrained(folder)
    edit(config, gate=raw["gate"], experts=[{"name": "x", "path": "../../etc"}])
    with pytest.raises(SourceError, match="leads out of its directory"):
        Mixture.from_pretrained(folder)
    edit(config, experts=raw["experts"], modules=["a"])
    with pytest.raises(AdapterError, match="modules"):
        Mixture.from_pretrained(folder)
    config.write_text("{")
    with pytest.raises(AdapterError, match="not valid JSON"):
        Mixture.from_pretrained(folder)
    with pytest.raises(SourceError, match="no mixture_config"):
        Mixture.from_pretrained(tmp_path / "expert0")
    with pytest.raises(SourceError, match="no such mixture directory"):
        Mixture.from_pretrained(tmp_path / "nowhere")


def test_the_target_is_protected(folder: Path, tmp_path: Path) -> None:
    mixture = Mixture.from_pretrained(folder)
    with pytest.raises(OutputError, match="holds an input"):
        mixture.save_pretrained(folder)
    with pytest.raises(OutputError, match="holds an input"):
        mixture.save_pretrained(folder, force=True)  # nor onto itself
    again = mixture.save_pretrained(tmp_path / "again")
    assert Mixture.from_pretrained(again).save_pretrained(tmp_path / "third").is_dir()
    mixture.save_pretrained(again, force=True)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "diary.txt").write_text("dear diary")
    with pytest.raises(OutputError, match="is not replaced"):
        mixture.save_pretrained(tmp_path / "notes", force=True)


def test_what_cannot_be_mixed_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    model = llama()
    paths = saved_experts(tmp_path, model)
    edit(Path(paths[1]) / "adapter_config.json", base_model_name_or_path="another-base")
    with pytest.raises(AlignmentError, match="base models differ"):
        Mixture(paths, "arrow")
    forced = Mixture(paths, "arrow", accept_base_models=True).save_pretrained(tmp_path / "forced")
    assert Mixture.from_pretrained(forced).names == ["expert0", "expert1", "expert2"]
    with pytest.raises(MethodError, match="2 weights for 3 experts"):
        Mixture(experts_for(model), "constant", weights=(1.0, 2.0))
    with pytest.raises(MethodError, match="no gate preset is called 'moe'"):
        Mixture(experts_for(model), "moe")
    with pytest.raises(MethodError, match="at least one expert"):
        Mixture([], "arrow")
    with pytest.raises(MethodError, match="subtracted by arrow"):
        Mixture(experts_for(model)[:2], "meteora", general=experts_for(model)[2:])
    with pytest.raises(MethodError, match="top_k is 0"):
        Mixture(experts_for(model), "arrow", top_k=0)


def test_names_are_made_unique(tmp_path: Path) -> None:
    model = llama()
    for run in ("a", "b", "c"):
        saved_experts(tmp_path / run, model, (4,))
    mixture = Mixture([tmp_path / run / "expert0" for run in "abc"], "arrow")
    assert mixture.names == ["expert0", "expert0-2", "expert0-3"]
    with pytest.raises(MethodError, match="3 experts, names"):
        Mixture(experts_for(model), "arrow", names=["x", "x", "y"])


def test_to_and_from_the_hub(folder: Path, tmp_path: Path, monkeypatch) -> None:
    """With a Hub that is a directory."""
    import shutil
    from types import SimpleNamespace

    import huggingface_hub

    made = []

    class Api:
        def create_repo(self, repo: str, private: bool, exist_ok: bool) -> None:
            made.append((repo, private, exist_ok))

        def upload_folder(self, repo_id: str, folder_path: Path, commit_message: str) -> Any:
            shutil.copytree(folder_path, tmp_path / "hub")
            return SimpleNamespace(commit_url="https://hub/commit/1")

    def download(repo: str, revision: str | None, allow_patterns: list[str]) -> str:
        assert (repo, revision) == ("me/mix", "v1")
        return str(tmp_path / "hub")

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    mixture = Mixture.from_pretrained(folder)
    assert mixture.push_to_hub("me/mix", private=True) == "https://hub/commit/1"
    assert made == [("me/mix", True, True)]
    again = Mixture.from_pretrained("me/mix@v1")
    assert all(torch.equal(again.gate[k], mixture.gate[k]) for k in mixture.gate)
    card = (tmp_path / "hub" / "README.md").read_text()
    assert "base_model: tiny-base" in card and "- meteora" in card
    (tmp_path / "hub" / "mixture_config.json").unlink()
    with pytest.raises(SourceError, match="holds no mixture_config"):
        Mixture.from_pretrained("me/mix@v1")
