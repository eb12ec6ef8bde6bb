#!/usr/bin/env bash
# PEFT 0.21.2: saving an adapter can change what its alpha_pattern means.
#
# Of several keys of `alpha_pattern` that match a module the first one counts. `save_pretrained`
# writes the config with sorted keys, so a general key that stood before a special one stands after
# it in the file, and the adapter that is loaded scales a module by another alpha than the one that
# was saved. Nothing is raised or logged. (With overlapping keys in `rank_pattern` the same order
# gives an adapter that cannot be loaded.)
#
# Seen:
#   peft 0.21.2, torch 2.13.0
#   set    ['q_proj', 'layers.1.q_proj']  scalings [2.0, 2.0]
#   saved  ['layers.1.q_proj', 'q_proj']  scalings [2.0, 8.0]
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/env"
"$place/env/bin/pip" install --quiet peft==0.21.2 torch==2.13.0 transformers==5.23.0 2>/dev/null
cd "$place"
PYTHONWARNINGS=ignore env/bin/python - <<'PYTHON'
import json
import sys
from pathlib import Path

import peft
import torch
from torch import nn

print(f"peft {peft.__version__}, torch {torch.__version__.split('+')[0]}")


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"q_proj": nn.Linear(8, 8)}) for _ in range(2))


def scalings(model):
    return [layer["q_proj"].scaling["default"] for layer in model.base_model.model.layers]


pattern = {"q_proj": 8, "layers.1.q_proj": 32}
config = peft.LoraConfig(r=4, lora_alpha=4, target_modules=["q_proj"], alpha_pattern=pattern)
model = peft.get_peft_model(Base(), config)
model.save_pretrained("adapter")
saved = list(json.loads(Path("adapter/adapter_config.json").read_text())["alpha_pattern"])
again = peft.PeftModel.from_pretrained(Base(), "adapter")
print(f"set    {list(pattern)}  scalings {scalings(model)}")
print(f"saved  {saved}  scalings {scalings(again)}")
sys.exit((scalings(model), scalings(again)) != ([2.0, 2.0], [2.0, 8.0]))
PYTHON
