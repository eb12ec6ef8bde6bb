#!/usr/bin/env bash
# PEFT 0.21.2: Arrow's general-knowledge subtraction depends on how an adapter is factored.
#
# With ArrowConfig(use_gks=True) the mean of the general adapters is taken away from each task
# adapter. PEFT takes it from A and from B separately, not from the update B A. So a general adapter
# whose A is multiplied by 4 and whose B is divided by 4, which is the same adapter in every other
# use, gives a model with other outputs.
#
# Seen:
#   peft 0.21.2, torch 2.13.0, transformers 5.23.0
#   the general adapter alone, factored in two ways: largest difference of logits 0.0
#   Arrow with it, factored in two ways: change of logits 2.0 times what Arrow itself changes
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/env"
"$place/env/bin/pip" install --quiet peft==0.21.2 torch==2.13.0 transformers==5.23.0 2>/dev/null
cd "$place"
PYTHONWARNINGS=ignore env/bin/python - 2>/dev/null <<'PYTHON'
import shutil
import sys

import peft
import torch
import transformers
from peft import ArrowConfig, PeftModel, create_arrow_model
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

print(f"peft {peft.__version__}, torch {torch.__version__.split('+')[0]}, "
      f"transformers {transformers.__version__}")


def base():
    torch.manual_seed(0)
    size = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    return LlamaForCausalLM(LlamaConfig(vocab_size=32, **size)).eval()


@torch.no_grad()
def logits(model):
    return model.eval()(torch.arange(8)[None]).logits


config = peft.LoraConfig(
    r=4, lora_alpha=8, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM"
)
for seed, name in enumerate(("first", "second", "general"), start=1):
    model = base()
    torch.manual_seed(seed)
    peft.get_peft_model(model, config).save_pretrained(name)
shutil.copytree("general", "refactored")
tensors = load_file("refactored/adapter_model.safetensors")
tensors = {key: t * 4 if "lora_A" in key else t / 4 for key, t in tensors.items()}
save_file(tensors, "refactored/adapter_model.safetensors", {"format": "pt"})

both = ("general", "refactored")
alone = [logits(PeftModel.from_pretrained(base(), name)) for name in both]
apart = (alone[0] - alone[1]).abs().max().item()
arrow = ArrowConfig(top_k=1, use_gks=True)
routed = [
    logits(create_arrow_model(base(), ["first", "second"], arrow, general_adapter_paths=[name]))
    for name in both
]
change = ((routed[0] - routed[1]).norm() / (routed[0] - logits(base())).norm()).item()
print(f"the general adapter alone, factored in two ways: largest difference of logits {apart}")
print("Arrow with it, factored in two ways: change of logits "
      f"{change:.1f} times what Arrow itself changes")
sys.exit(not (apart == 0 and change > 0.5))
PYTHON
