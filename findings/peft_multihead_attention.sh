#!/usr/bin/env bash
# PEFT adds the LoRA of an nn.MultiheadAttention's out_proj twice, in training and when merging.
#
# PEFT wraps the attention and, inside it, its out_proj. Merging the attention adds out_proj's delta
# to its weight and then merges out_proj, which adds the delta again; forward() does the same. The
# model learns with twice the delta that lora_alpha / r * B @ A says, so a tool that reads the file
# by PEFT's own formula gets another model. The joined input projection is added once.
#
#   0.19.1 in_proj 1.00 out_proj 2.00 forward 2.00
#   0.21.2 in_proj 1.00 out_proj 2.00 forward 2.00
#
# What helps: merge such an adapter by the PEFT that trained it.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat > "$work/attention.py" <<'PYTHON'
import copy

import peft
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x):
        return self.attn(x, x, x, need_weights=False)[0]


torch.manual_seed(0)
base = Net().eval()
config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["attn"], init_lora_weights=False)
model = peft.get_peft_model(copy.deepcopy(base), config).eval()
x = torch.randn(2, 5, 16)
live = model(x).detach()
factors = peft.get_peft_model_state_dict(model)
delta = {}
for key, a in factors.items():
    if ".lora_A." in key:
        name = "out_proj" if "out_proj" in key else "in_proj"
        delta[name] = 2 * factors[key.replace("lora_A", "lora_B")] @ a
ours = copy.deepcopy(base)
with torch.no_grad():
    ours.attn.in_proj_weight += delta["in_proj"]
    ours.attn.out_proj.weight += 2 * delta["out_proj"]
forward = 2.0 if torch.allclose(ours(x), live, atol=1e-4) else 1.0
merged = model.merge_and_unload().attn
changed = {
    "in_proj": merged.in_proj_weight - base.attn.in_proj_weight,
    "out_proj": merged.out_proj.weight - base.attn.out_proj.weight,
}
ratio = {n: float((changed[n] * d).sum() / (d * d).sum()) for n, d in delta.items()}
print(
    f"{peft.__version__} in_proj {ratio['in_proj']:.2f} out_proj {ratio['out_proj']:.2f} "
    f"forward {forward:.2f}"
)
PYTHON
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 accelerate==1.15.0 \
    numpy==2.4.6 safetensors==0.8.0 psutil==7.2.2 >&2
for version in 0.19.1 0.21.2; do
    "$work/venv/bin/pip" install --quiet --no-deps --target "$work/$version" "peft==$version" >&2
    PYTHONPATH="$work/$version" "$work/venv/bin/python" -W ignore "$work/attention.py" | tee -a "$work/seen"
done
diff "$work/seen" - <<'EXPECTED'
0.19.1 in_proj 1.00 out_proj 2.00 forward 2.00
0.21.2 in_proj 1.00 out_proj 2.00 forward 2.00
EXPECTED
