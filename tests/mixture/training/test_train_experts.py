"""Experts that train with their gate: new adapters, the old ones untouched."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from tiny import llama, saved_experts, shapes_of, tokens

from lora_merge.errors import MethodError
from lora_merge.mixture.mixture import Mixture
from lora_merge.mixture.runtime.attach import load_mixture
from lora_merge.mixture.training.data import Example
from lora_merge.mixture.training.loop import mean_loss
from lora_merge.mixture.training.settings import TrainSettings
from lora_merge.mixture.training.train import train_gate

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
EXAMPLES = [Example(tuple(r.tolist()), 2, i % 3) for i, r in enumerate(tokens(12, 10, seed=3))]


def hashes(folder: Path) -> dict[str, str]:
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


@pytest.mark.parametrize("preset", ["meteora", "xlora", "smora", "constant"])
def test_experts_train_and_the_inputs_stay(preset: str, tmp_path: Path) -> None:
    model = llama()
    sources = saved_experts(tmp_path / "in", model)
    before, state = hashes(tmp_path / "in"), {k: v.clone() for k, v in model.state_dict().items()}
    mixture = Mixture(sources, preset)
    history = []
    settings = TrainSettings(steps=40, batch_size=12, train_experts=True, expert_lr=0.02, warmup=2)
    trained = train_gate(model, mixture, EXAMPLES, settings, on_step=history.append)
    assert history[-1]["loss"] < history[0]["loss"] - 0.15
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    trained.save_pretrained(tmp_path / "out")
    assert hashes(tmp_path / "in") == before
    config = json.loads((tmp_path / "out/mixture_config.json").read_text())
    assert not {e["sha256"] for e in config["experts"]} & set(before.values())
    again = Mixture.from_pretrained(tmp_path / "out")
    handle = load_mixture(model, again)
    assert mean_loss(model, EXAMPLES) < history[0]["loss"] - 0.15
    handle.detach()


def test_a_trained_expert_is_a_plain_peft_adapter(tmp_path: Path) -> None:
    from peft import PeftModel

    model = llama()
    mixture = Mixture(saved_experts(tmp_path / "in", model), "meteora")
    settings = TrainSettings(
        steps=8, batch_size=12, train_experts=True, expert_lr=0.02, rank_l1=1e-4, rank_lr=2000.0
    )
    trained = train_gate(model, mixture, EXAMPLES, settings)
    folder = trained.save_pretrained(tmp_path / "out")
    handle = load_mixture(model, trained)
    handle.set_gate(weights={trained.names[1]: 1.0})
    expected = model(tokens()).logits
    handle.detach()
    ranks = set(trained.experts[1].adapter.ranks())
    assert len(ranks) > 1, "the test wants ranks that differ"
    one = next((folder / "experts").glob("01-*"))
    torch.testing.assert_close(
        PeftModel.from_pretrained(model, str(one))(tokens()).logits, expected, rtol=1e-4, atol=1e-5
    )


def test_a_killed_run_resumes_to_the_same_experts(tmp_path: Path) -> None:
    model = llama()
    mixture = Mixture(saved_experts(tmp_path / "in", model), "meteora")
    settings = TrainSettings(
        steps=8,
        batch_size=5,
        save_every=3,
        train_experts=True,
        expert_lr=0.01,
        rank_l1=1e-3,
        rank_lr=20.0,
    )
    whole = train_gate(model, mixture, EXAMPLES, settings, work=tmp_path / "whole")

    class Killed(Exception):
        pass

    def kill(metrics: dict) -> None:
        if metrics["step"] == 5:
            raise Killed

    with pytest.raises(Killed):
        train_gate(model, mixture, EXAMPLES, settings, work=tmp_path / "cut", on_step=kill)
    resumed = train_gate(model, mixture, EXAMPLES, settings, work=tmp_path / "cut", resume=True)
    for name in whole.gate:
        assert torch.equal(whole.gate[name], resumed.gate[name])
    for one, other in zip(whole.experts, resumed.experts, strict=True):
        for module in one.adapter.modules:
            pairs = zip(one.adapter.read(module), other.adapter.read(module), strict=True)
            assert all(torch.equal(a, b) for a, b in pairs)
    with pytest.raises(MethodError, match=r"other settings \(expert_lr\)"):
        train_gate(
            model, mixture, EXAMPLES, TrainSettings(**{**vars(settings), "expert_lr": 1.0}),
            work=tmp_path / "cut", resume=True,
        )  # fmt: skip


def test_half_precision_bases_keep_float32_experts(tmp_path: Path) -> None:
    """An update below half precision's rounding is not lost."""
    model = llama(dtype=torch.bfloat16)
    mixture = Mixture(saved_experts(tmp_path, model), "meteora")
    settings = TrainSettings(
        steps=3, batch_size=12, train_experts=True, expert_lr=1e-6, schedule="constant", warmup=0
    )
    trained = train_gate(model, mixture, EXAMPLES, settings)
    name = next(iter(shapes_of(model)))
    old, new = (x.experts[0].adapter.read(name)[0].double() for x in (mixture, trained))
    scale = (new.norm() / old.norm()).log2().round().exp2()  # factors are balanced by powers of 2
    change = (new / scale - old).abs()
    assert 0 < float(change.max()) < 1e-5


def test_gates_computed_from_the_experts_keep_them(tmp_path: Path) -> None:
    model = llama()
    mixture = Mixture(saved_experts(tmp_path, model), "spectr")
    with pytest.raises(MethodError, match="computed from the experts"):
        train_gate(model, mixture, EXAMPLES, TrainSettings(train_experts=True))
