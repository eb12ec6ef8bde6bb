"""What reading costs in each format: the same factors as PEFT, kohya, mlx-lm and GGUF files.

    python benchmarks/reading.py

CPU seconds to open a file and to read the stack of every module, the best of interleaved repeats,
and their ratio to PEFT's.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

import lora_merge
from lora_merge.files.gguf.writing import GGUFStream

SAID = {"general.architecture": "llama", "general.type": "adapter", "adapter.type": "lora"}


def write(folder: Path, layers: int, size: int, rank: int) -> dict[str, Path]:
    """The files; A (r, in), B (out, r), random, scaling 1."""
    names = [f"model.layers.{i}.self_attn.{p}_proj" for i in range(layers) for p in "qkvo"]
    torch.manual_seed(0)
    pairs = {n: (torch.randn(rank, size), torch.randn(size, rank)) for n in names}
    peft, kohya, mlx, blocks = {}, {}, {}, {}
    for number, (name, (a, b)) in enumerate(pairs.items()):
        peft |= {f"base_model.model.{name}.lora_A.weight": a}
        peft |= {f"base_model.model.{name}.lora_B.weight": b}
        flat = "lora_te_" + name.replace(".", "_")
        kohya |= {f"{flat}.lora_down.weight": a, f"{flat}.lora_up.weight": b}
        kohya |= {f"{flat}.alpha": torch.tensor(float(rank))}
        mlx |= {f"{name}.lora_a": a.mT.contiguous(), f"{name}.lora_b": b.mT.contiguous()}
        place = f"blk.{number // 4}.attn_{'qkvo'[number % 4]}.weight"
        blocks |= {f"{place}.lora_a": a, f"{place}.lora_b": b}
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": targets}
    said = {"fine_tune_type": "lora", "lora_parameters": {"rank": rank, "scale": 1.0}}
    for kind, tensors, document in (("peft", peft, config), ("mlx", mlx, said)):
        (folder / kind).mkdir()
        save_file(tensors, folder / kind / "adapter_model.safetensors")
        (folder / kind / "adapter_config.json").write_text(json.dumps(document))
    save_file(kohya, folder / "kohya.safetensors")
    with GGUFStream(
        folder / "a.gguf", {n: ("F32", tuple(t.shape)) for n, t in blocks.items()}, SAID
    ) as stream:
        for name, tensor in blocks.items():
            stream.write(name, tensor)
    files = {"peft": folder / "peft", "mlx": folder / "mlx"}
    return {**files, "kohya": folder / "kohya.safetensors", "gguf": folder / "a.gguf"}


def cost(path: Path) -> tuple[float, float]:
    """CPU seconds of opening, and of reading every module's stack."""
    start = time.process_time()
    adapter = lora_merge.open_adapter(path)
    opened = time.process_time()
    for name in adapter.modules:
        adapter.stacks(name)
    return opened - start, time.process_time() - opened


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=7)
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        files = write(Path(name), given.layers, given.size, given.rank)
        seen = {kind: [] for kind in files}
        for _ in range(given.repeats):
            for kind, path in files.items():
                seen[kind].append(cost(path))
    best = {k: [min(part) for part in zip(*costs, strict=True)] for k, costs in seen.items()}
    print(f"{4 * given.layers} modules of {given.size} x {given.size}, rank {given.rank}")
    print("format   open ms  read ms  read / PEFT  all / PEFT")
    for kind, (opening, reading) in best.items():
        whole = (opening + reading) / sum(best["peft"])
        ratio = reading / best["peft"][1]
        print(f"{kind:8} {1e3 * opening:7.1f} {1e3 * reading:8.1f} {ratio:12.2f} {whole:11.2f}")


if __name__ == "__main__":
    main()
