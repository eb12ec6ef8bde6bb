#!/usr/bin/env bash
# LyCORIS 4.1.3: a LoHa merged into its layer is not the layer it was: merge_to scales its delta by
# alpha / rank twice, forward once. With alpha = rank the two agree, with alpha = 2 and rank 4 the
# merged delta is half of the trained one.
#
# Seen:
#   lycoris-lora 4.1.3, torch 2.13.0
#   alpha 4, rank 4: norm of the merged delta / norm of forward's delta = 1.000
#   alpha 2, rank 4: norm of the merged delta / norm of forward's delta = 0.500
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
# torch of PyPI brings CUDA along on Linux; the CPU wheels do as well.
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 lycoris-lora==4.1.3 numpy==2.4.6 safetensors==0.8.0
"$folder/venv/bin/python" - <<'PY'
from importlib.metadata import version

import torch
from lycoris.modules.loha import LohaModule
from torch import nn

print(f"lycoris-lora {version('lycoris-lora')}, torch {torch.__version__.partition('+')[0]}")
ratios = []
for alpha in (4, 2):
    torch.manual_seed(0)
    layer = nn.Linear(8, 8, bias=False)
    before = layer.weight.detach().clone()
    module = LohaModule("x", layer, lora_dim=4, alpha=alpha).eval()
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    eye = torch.eye(8)
    forward = (module(eye) - layer(eye)).detach().T
    module.merge_to()
    merged = layer.weight.detach() - before
    ratios.append(float(merged.norm() / forward.norm()))
    print(f"alpha {alpha}, rank 4: norm of the merged delta / norm of forward's delta = {ratios[-1]:.3f}")
raise SystemExit(abs(ratios[0] - 1) > 1e-3 or abs(ratios[1] - 0.5) > 1e-3)
PY
