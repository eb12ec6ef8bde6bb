#!/usr/bin/env bash
# PEFT 0.21.2: `convert_to_lora` of a DoRA adapter gives a LoRA without DoRA's magnitude, silently.
#
# DoRA's weight is m * (W + s B A) / |W + s B A|. `peft.convert_to_lora` is documented to turn other
# adapters into LoRA by a decomposition of their delta; of a DoRA adapter it decomposes s B A alone.
# No error, no warning: at a rank that holds the whole of s B A, the model with the converted adapter
# is another one.
#
# Seen (relative distance of the outputs from those of the DoRA model, on random input):
#   peft 0.21.2, torch 2.13.0
#   DoRA, magnitude trained: 0.305, warnings about it: 0
#   the same with plain LoRA: 2.3e-07
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/env"
"$place/env/bin/pip" install --quiet peft==0.21.2 torch==2.13.0 transformers==5.23.0 2>/dev/null
cd "$place"
PYTHONWARNINGS=ignore env/bin/python - <<'PYTHON'
import sys
import warnings

import peft
import torch
from torch import nn

print(f"peft {peft.__version__}, torch {torch.__version__.split('+')[0]}")


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.config = {"model_type": "tiny"}
        self.layer = nn.Linear(24, 32, bias=False)

    def forward(self, x):
        return self.layer(x)


def distance(use_dora):
    """Of the model with the converted adapter from the model with the adapter itself."""
    torch.manual_seed(1)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["layer"], use_dora=use_dora)
    model = peft.get_peft_model(Model(), config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
            if "magnitude" in name:
                parameter.mul_(1.5)
    x = torch.randn(64, 24)
    with torch.no_grad():
        wanted = model(x)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        new_config, tensors = peft.convert_to_lora(model, rank=16)
    told = [str(w.message) for w in told if "magnitude" in str(w.message).lower()]
    fresh = peft.get_peft_model(Model(), new_config).eval()
    peft.set_peft_model_state_dict(fresh, tensors)
    with torch.no_grad():
        got = fresh(x)
    return float((got - wanted).norm() / wanted.norm()), told


dora, told = distance(True)
lora, _ = distance(False)
print(f"DoRA, magnitude trained: {dora:.3f}, warnings about it: {len(told)}")
print(f"the same with plain LoRA: {lora:.1e}")
sys.exit(not (dora > 0.2 and lora < 1e-4 and not told))
PYTHON
