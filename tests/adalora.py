"""PEFT's AdaLoRA on a model of two layers: checkpoints, and what PEFT makes of them."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

NAMES = ("up", "down")


class Tiny(torch.nn.Module):
    """Two layers, linear or GPT-2's Conv1D."""

    def __init__(self, transposed: bool = False) -> None:
        super().__init__()
        from transformers.pytorch_utils import Conv1D

        self.up = Conv1D(24, 16) if transposed else torch.nn.Linear(16, 24)
        self.down = Conv1D(16, 24) if transposed else torch.nn.Linear(24, 16)


def peft_deltas(folder: Path, transposed: bool = False) -> dict[str, Tensor]:
    """What PEFT adds to each layer after loading an adapter."""
    from peft import PeftModel

    loaded = PeftModel.from_pretrained(Tiny(transposed), folder)
    layers = dict(loaded.base_model.model.named_modules())
    return {name: layers[name].get_delta_weight("default").detach() for name in NAMES}


def save_adalora(
    folder: Path,
    kept: Mapping[str, Sequence[bool]] | None = None,
    *,
    alpha: int = 32,
    transposed: bool = False,
    dtype: torch.dtype = torch.float32,
    zeroed: Mapping[str, Sequence[int]] | None = None,
) -> dict[str, Tensor]:
    """Write a checkpoint of initial rank 6; returns the deltas of `peft_deltas`.

    Args:
        folder: Where to.
        kept: Layer → mask of the units that the end of training keeps; None before it.
        alpha: lora_alpha.
        transposed: Conv1D layers.
        dtype: Of the factors.
        zeroed: Layer → units whose gate is zero, as while training prunes.
    """
    from peft import AdaLoraConfig, get_peft_model

    torch.manual_seed(0)
    config = AdaLoraConfig(
        target_modules=list(NAMES),
        init_r=6,
        target_r=3,
        lora_alpha=alpha,
        total_step=10,
        fan_in_fan_out=transposed,
    )
    model = get_peft_model(Tiny(transposed), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.5)
        layers = dict(model.base_model.model.named_modules())
        for name, units in (zeroed or {}).items():
            layers[name].lora_E["default"][list(units)] = 0
    if kept is not None:
        masks = {f"{name}.lora_E.default": list(mask) for name, mask in kept.items()}
        model.peft_config["default"].rank_pattern = masks
    model.to(dtype).save_pretrained(folder)
    return peft_deltas(folder, transposed)
