"""What `tune` times on the kernels is what they compute in a model."""

import pytest
import torch

from lora_merge.kernels.gated_stack import tune as tuning
from lora_merge.kernels.gated_stack import tune_cases
from lora_merge.kernels.gated_stack.tune import tune
from lora_merge.kernels.gated_stack.tune_cases import StackShape
from lora_merge.machine.timing import measure


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_kernel_is_timed_and_trusted(dtype, device, monkeypatch) -> None:
    monkeypatch.setattr(tune_cases, "_COLD", 1 << 12)

    def once(work, place, **_):
        return measure(work, place, rounds=1, least=0.0)

    monkeypatch.setattr(tuning, "measure", once)
    shape = StackShape(48, (32, 16), (2, 3, 4))
    for row in tune([shape], torch.device(device), dtype, tokens=[1, 3, 20]):
        assert set(row.timings) == {"base", "eager", "concat", "triton", "joined"}
        assert not row.excluded
