#!/usr/bin/env bash
# PEFT 0.21.2: add_weighted_adapter over rsLoRA adapters gives sqrt(rank of the result) times the sum.
#
# The merged adapter takes its config from the first one, `use_rslora` included, and sets alpha to
# its rank so that the scaling is 1. With rsLoRA the scaling is alpha / sqrt(rank), so a merge of two
# adapters of rank 4 by "cat", which is exact for plain LoRA, is sqrt(8) times too large; "svd" and
# "linear" (rank 4) double. Nothing is raised or logged.
#
# Seen (norm of the merged update over that of the same merge of plain LoRA):
#   peft 0.21.2, torch 2.13.0
#   cat     2.828
#   svd     2.000
#   linear  2.000
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/env"
"$place/env/bin/pip" install --quiet peft==0.21.2 torch==2.13.0 transformers==5.23.0 2>/dev/null
cd "$place"
PYTHONWARNINGS=ignore env/bin/python - <<'PYTHON'
import math
import sys

import peft
import torch

print(f"peft {peft.__version__}, torch {torch.__version__.split('+')[0]}")


def merged(kind, use_rslora):
    """Update of the merge of two adapters whose own updates do not depend on use_rslora."""
    alpha = 4 / math.sqrt(4) if use_rslora else 4  # scaling 1 either way
    config = peft.LoraConfig(
        r=4, lora_alpha=alpha, target_modules=["0"], use_rslora=use_rslora, init_lora_weights=False
    )
    torch.manual_seed(0)
    model = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(8, 8)), config, "first")
    model.add_adapter("second", config)
    model.add_weighted_adapter(["first", "second"], [1.0, 1.0], "merged", combination_type=kind)
    return model.base_model.model[0].get_delta_weight("merged")


seen = {k: (merged(k, True).norm() / merged(k, False).norm()).item() for k in ("cat", "svd", "linear")}
for kind, ratio in seen.items():
    print(f"{kind:7} {ratio:.3f}")
expected = {"cat": math.sqrt(8), "svd": 2.0, "linear": 2.0}
sys.exit(any(abs(seen[kind] - ratio) > 1e-3 for kind, ratio in expected.items()))
PYTHON
