"""Two processes train the gate that one does, and only the first writes."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from builders import save_adapter
from lora_merge.errors import MethodError
from lora_merge.mixture.mixture import Mixture
from lora_merge.mixture.training.data import Example
from lora_merge.mixture.training.processes import Processes, shard
from lora_merge.mixture.training.settings import TrainSettings
from lora_merge.mixture.training.train import train_gate

HERE = Path(__file__).parent
SHAPES = {"body.first": (24, 16), "body.second": (16, 24)}
CASES = (("whole", "smora"), ("sharded", "meteora"))
RUN = """
import sys
from pathlib import Path
import torch
import test_processes as test
from lora_merge.mixture.training import processes
torch.set_num_threads(1)
assert processes.is_launched() and processes.join(cpu=True).type == "cpu"
rank, root = processes.Processes.current().rank, Path(sys.argv[1])
for base, preset in test.CASES:
    result = test.train(root, base, preset, f"{preset}{rank}")
    torch.save(dict(result.gate), root / f"{preset}{rank}.pt")
processes.leave()
"""


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.second(torch.relu(self.first(hidden)))


class Tiny(nn.Module):
    """A causal model without attention or transformers, quick to import."""

    _no_split_modules = ("Layer",)

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(30, 16)
        self.body = Layer()
        self.head = nn.Linear(16, 30)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, use_cache: bool = False
    ) -> SimpleNamespace:
        hidden = self.embed(input_ids)
        scores = self.head(self.body(hidden))[:, :-1].flatten(0, 1)
        return SimpleNamespace(loss=nn.functional.cross_entropy(scores, labels[:, 1:].flatten()))


def made(root: Path, preset: str) -> Mixture:
    paths = [str(root / f"expert{i}") for i in range(3)]
    return Mixture(paths, preset, top_k=4 if preset == "smora" else 2)


def train(root: Path, base: str, preset: str, work: str) -> Mixture:
    model = Tiny()
    if base == "sharded":
        shard(model, torch.device("cpu"))
    random = torch.Generator().manual_seed(3)
    drawn = torch.randint(0, 30, (12, 10), generator=random).tolist()
    rows = [Example(tuple(row[: 7 + i % 4]), 2, i % 3) for i, row in enumerate(drawn)]
    rank = preset == "smora"
    settings = TrainSettings(
        steps=6, batch_size=5, accumulate=2, lr=0.01, warmup=1, train_experts=True, z_loss=0.01,
        bias_rate=0.01 * rank, rank_l1=0.0 if rank else 1e-3, rank_lr=20.0,
    )  # fmt: skip
    mixture = made(root, preset)
    return train_gate(model, mixture, rows, settings, evaluation=rows[:3], work=root / work)


@pytest.mark.timeout(120)
def test_two_processes_train_what_one_does(tmp_path: Path) -> None:
    """Same batches, same sums: also with the base sharded over the processes."""
    for seed in range(3):
        save_adapter(tmp_path / f"expert{seed}", r=4, alpha=20, seed=seed, shapes=SHAPES)
    paths = os.pathsep.join(
        [str(HERE.parents[2] / "src"), str(HERE), str(HERE.parent), str(HERE.parents[1])]
    )
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    launched = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    environment = {**os.environ, **launched, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    running = [
        subprocess.Popen(
            [sys.executable, "-c", RUN, str(tmp_path)],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    for process in running:
        errors = process.communicate()[1]
        assert process.returncode == 0, errors
    for _, preset in CASES:
        alone = train(tmp_path, "whole", preset, "alone")
        start = made(tmp_path, preset).gate
        first, second = (torch.load(tmp_path / f"{preset}{rank}.pt") for rank in range(2))
        for name, tensor in alone.gate.items():
            assert torch.equal(first[name], second[name])
            torch.testing.assert_close(first[name], tensor, rtol=1e-3, atol=1e-4)
            assert not torch.equal(tensor, start[name])
        assert (tmp_path / f"{preset}0").is_dir() and not (tmp_path / f"{preset}1").exists()
        assert not (tmp_path / f"{preset}1.metrics.jsonl").exists()
        pairs = zip(metrics(tmp_path, f"{preset}0"), metrics(tmp_path, "alone"), strict=True)
        for ours, theirs in pairs:
            assert ours["tokens"] == theirs["tokens"]
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
            assert ours.get("eval_loss", 0) == pytest.approx(theirs.get("eval_loss", 0), rel=1e-4)


def metrics(root: Path, name: str) -> list[dict]:
    return [json.loads(x) for x in (root / f"{name}.metrics.jsonl").read_text().splitlines()]


def test_one_process_needs_no_group() -> None:
    assert Processes.current() == Processes(0, 1)
    one = torch.ones(2)
    Processes.current().add_up([one])
    assert one.tolist() == [1, 1]


def test_each_process_needs_a_row(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for seed in range(3):
        save_adapter(tmp_path / f"expert{seed}", r=4, seed=seed, shapes=SHAPES)
    monkeypatch.setattr(Processes, "current", classmethod(lambda cls: cls(0, 20)))
    with pytest.raises(MethodError, match="batches of 5 rows for 20 processes"):
        train(tmp_path, "whole", "smora", "work")
