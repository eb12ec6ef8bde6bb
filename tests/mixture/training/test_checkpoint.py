"""A checkpoint that is not as it was written is an error, and none is taken up in part."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lora_merge.errors import MethodError
from lora_merge.mixture.training.checkpoint import check_work, restore_state, save_state
from lora_merge.mixture.training.settings import TrainSettings

SETTINGS = TrainSettings(steps=3)


def written(work: Path) -> tuple[nn.Parameter, torch.optim.Optimizer]:
    weight = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight], lr=0.1)
    weight.grad = torch.ones(3)
    optimizer.step()
    save_state(work, 2, SETTINGS, [weight], optimizer)
    return weight, optimizer


def test_a_checkpoint_is_taken_up(tmp_path: Path) -> None:
    weight, optimizer = written(tmp_path / "work")
    kept = weight.detach().clone()
    with torch.no_grad():
        weight.zero_()
    assert restore_state(tmp_path / "work", SETTINGS, [weight], optimizer) == 2
    assert torch.equal(weight, kept)


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state.pop("step"),
        lambda state: state.update(step=-1),
        lambda state: state.update(step=1e300),
        lambda state: state.update(settings=[]),
        lambda state: state.update(tensors=[1, 2]),
        lambda state: state["tensors"][0].fill_(float("nan")),
        lambda state: state.update(optimizer=None),
        lambda state: state.update(optimizer={"state": {}, "param_groups": [{"params": [0, 1]}]}),
        lambda state: state["optimizer"].pop("param_groups"),
    ],
)
def test_what_is_no_checkpoint_is_refused(
    change: Callable[[dict[str, Any]], Any], tmp_path: Path
) -> None:
    work = tmp_path / "work"
    weight, optimizer = written(work)
    state = torch.load(work / "state.pt", weights_only=True)
    change(state)
    torch.save(state, work / "state.pt")
    with pytest.raises(MethodError, match=r"checkpoint (cannot be read|does not fit)"):
        restore_state(work, SETTINGS, [weight], optimizer)


@pytest.mark.parametrize("data", [b"", b"PK\x03\x04", b"\x80\x04]q\x00.", b"garbage" * 99])
def test_what_is_no_file_of_torch_is_refused(data: bytes, tmp_path: Path) -> None:
    written(tmp_path / "work")
    (tmp_path / "work" / "state.pt").write_bytes(data)
    with pytest.raises(MethodError, match="cannot be read"):
        check_work(tmp_path / "work", resume=True)
