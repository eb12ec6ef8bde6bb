"""New experts, trained from scratch with their gate."""

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from tiny import llama, tokens

import lora_merge
from builders import make_adapter
from lora_merge.cli.app import cli
from lora_merge.errors import MethodError
from lora_merge.mixture.fresh import fresh_adapters
from lora_merge.mixture.mixture import Mixture
from lora_merge.mixture.runtime.attach import load_mixture
from lora_merge.mixture.training.base_model import linear_modules
from lora_merge.mixture.training.data import Example
from lora_merge.mixture.training.loop import mean_loss
from lora_merge.mixture.training.settings import TrainSettings
from lora_merge.mixture.training.train import train_gate

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
EXAMPLES = [Example(tuple(r.tolist()), 0, -1) for r in tokens(8, 10, seed=3)]


@pytest.fixture
def base(tmp_path: Path) -> str:
    llama().save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


def test_all_linear_modules_but_the_heads(base: str, tmp_path: Path) -> None:
    from transformers import BertConfig, BertForSequenceClassification

    model = llama()
    inside = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    assert sorted(linear_modules(base)) == sorted(n for n in inside if n != "lm_head")
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    bert = BertForSequenceClassification(BertConfig(vocab_size=61, intermediate_size=48, **small))
    bert.save_pretrained(tmp_path / "bert")
    found = linear_modules(str(tmp_path / "bert"))
    assert found["bert.encoder.layer.0.output.dense"] == (32, 48)
    assert not any(name.startswith("classifier") for name in found)


@pytest.mark.parametrize("preset", ["smora", "constant", "meteora"])
def test_it_starts_as_the_base_and_learns(preset: str, base: str, tmp_path: Path) -> None:
    model = llama()
    before = model(tokens()).logits
    names = ("one", "two") if preset == "meteora" else ("one",)
    settings = {"weights": (1.0,)} if preset == "constant" else {"top_k": 2}
    start = lora_merge.fresh_mixture(base, 6, preset, names=names, settings=settings)
    handle = load_mixture(model, start)
    assert torch.equal(model(tokens()).logits, before)
    handle.detach()
    history: list = []
    training = TrainSettings(steps=30, batch_size=8, train_experts=True, expert_lr=0.03, warmup=2)
    trained = train_gate(model, start, EXAMPLES, training, on_step=history.append)
    assert history[-1]["loss"] < history[0]["loss"] - 0.3
    trained.save_pretrained(tmp_path / "trained")
    load_mixture(model, tmp_path / "trained")
    assert mean_loss(model, EXAMPLES) < history[0]["loss"] - 0.3


def test_ranks_that_were_never_chosen_keep_their_place(base: str) -> None:
    """A gate over ranks has a row for each, also for those whose B is still zero."""
    start = lora_merge.fresh_mixture(base, 12, "smora", settings={"top_k": 1})
    training = TrainSettings(steps=1, batch_size=2, train_experts=True, expert_lr=0.03)
    trained = train_gate(llama(), start, EXAMPLES[:2], training)
    assert set(trained.experts[0].adapter.ranks()) == {12}


def test_the_command(base: str, tmp_path: Path) -> None:
    out = str(tmp_path / "new")
    arguments = ["gate", "--fresh", "4", "--preset", "smora", "--base", base, "-o", out, "--json"]
    done = CliRunner().invoke(cli, arguments)
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["experts"][0]["ranks"] == [4]
    again = Mixture.from_pretrained(out)
    direct = lora_merge.fresh_mixture(base, 4)
    name = again.modules[0]
    for one, other in zip(
        again.experts[0].adapter.stacks(name), direct.experts[0].adapter.stacks(name), strict=True
    ):
        assert torch.equal(one.down, other.down) and not one.up.any()
    wrong = CliRunner().invoke(cli, ["gate", "--fresh", "4", "x", "--base", base, "-o", out])
    assert wrong.exit_code == 2 and "names no others" not in wrong.output


def test_numbers_beyond_what_a_machine_bears_are_refused() -> None:
    with pytest.raises(MethodError, match="a rank from 1 to 65536"):
        fresh_adapters({"layers.0.q_proj": (4, 4)}, 10**20, ["a"])
    with pytest.raises(MethodError, match="lr is 1e"):
        TrainSettings(lr=1e308)
    with pytest.raises(MethodError, match="a hidden state of 1000"):
        Mixture([make_adapter("a", seed=1), make_adapter("b", seed=2)], "xlora", hidden_size=10**20)
