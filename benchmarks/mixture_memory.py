"""How much a process grows when a mixture is attached and generates, beside the mixture's own size.

Each preset runs in a fresh process: the base generates, then the mixture is attached and generates
as much; the growth of the peak resident size is what the mixture costs.

    python benchmarks/mixture_memory.py
"""

import json
import resource
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import torch
from mixture_models import SETTINGS, build, save_experts

from lora_merge.mixture.mixture import Mixture
from lora_merge.mixture.runtime.attach import load_mixture

ALLOWED = 64 * 2**20  # bytes above the packed size
CASES = [(preset, "stack") for preset in SETTINGS]
CASES += [("arrow", "rows"), ("arrow", "border"), ("xlora", "rows")]


def growth_table(vocabulary: int, paths: list[str]) -> str:
    """One row per preset and layout, as a Markdown table."""
    rows = [
        "## Memory",
        "",
        "| | packed MB | growth MB | above packed | aim |",
        "| - |" + " - |" * 4,
    ]
    for preset, layout in CASES:
        command = [sys.executable, __file__, str(vocabulary), preset, layout, *paths]
        found = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
        packed, growth = found["packed"] / 2**20, found["growth"] / 2**20
        cells = [packed, growth, growth - packed, ALLOWED / 2**20]
        rows.append(" | ".join([f"| {preset}, {layout}", *(f"{c:.1f}" for c in cells)]) + " |")
    return "\n".join(rows)


def grow(vocabulary: int, preset: str, layout: str, paths: list[str]) -> dict[str, int]:
    """Bytes of the mixture and of the growth, in this process."""
    warnings.filterwarnings("ignore")
    model = build(vocabulary)
    prompt = torch.randint(1, vocabulary, (1, 128), generator=torch.Generator().manual_seed(2))

    def generate() -> int:
        model.generate(
            input_ids=prompt, attention_mask=torch.ones_like(prompt), do_sample=False,
            max_new_tokens=64, min_new_tokens=64,
        )  # fmt: skip
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    before = generate()
    handle = load_mixture(model, Mixture(paths, preset, **SETTINGS[preset]), layout=layout)
    if preset == "request":
        handle.set_gate(requests=["expert1"])
    return {"packed": handle.overhead().bytes, "growth": generate() - before}


def main() -> None:
    if len(sys.argv) > 1:
        vocabulary, preset, layout, *paths = sys.argv[1:]
        print(json.dumps(grow(int(vocabulary), preset, layout, paths)))
        return
    with tempfile.TemporaryDirectory() as folder:
        print(growth_table(32000, save_experts(build(32000), Path(folder))))


if __name__ == "__main__":
    main()
