#!/usr/bin/env bash
# PEFT 0.21.2 with transformers 5.23.0: an adapter cannot be called "double", "half" or "train".
#
# The names come from users (folders, merge tools), and `PeftModel.from_pretrained(...,
# adapter_name="double")` takes any string. PEFT keeps the adapters' layers in a torch ModuleDict,
# which refuses keys that are attributes of every module, so the call ends in a KeyError that names
# neither the adapter nor PEFT. The same adapter under another name loads.
#
# Seen:
#   peft 0.21.2, torch 2.13.0, transformers 5.23.0
#   math    loads
#   double  KeyError: attribute 'double' already exists
#   half    KeyError: attribute 'half' already exists
#   train   KeyError: attribute 'train' already exists
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/env"
"$place/env/bin/pip" install --quiet peft==0.21.2 torch==2.13.0 transformers==5.23.0 2>/dev/null
cd "$place"
PYTHONWARNINGS=ignore env/bin/python - <<'PYTHON'
import sys

import peft
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

print(f"peft {peft.__version__}, torch {torch.__version__.split('+')[0]}, "
      f"transformers {transformers.__version__}")


def base():
    size = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    return LlamaForCausalLM(LlamaConfig(vocab_size=32, **size))


config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
peft.get_peft_model(base(), config).save_pretrained("adapter")
seen = {}
for name in ("math", "double", "half", "train"):
    try:
        peft.PeftModel.from_pretrained(base(), "adapter", adapter_name=name)
        seen[name] = "loads"
    except KeyError as error:
        seen[name] = f"KeyError: {error.args[0]}"
    print(f"{name:7} {seen[name]}")
expected = {"math": "loads"}
expected |= {n: f"KeyError: attribute '{n}' already exists" for n in ("double", "half", "train")}
sys.exit(seen != expected)
PYTHON
