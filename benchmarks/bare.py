"""The least a merge could do: import torch, load the files, save one output of the same size.

    python benchmarks/bare.py OUT SIZE ADAPTER...

SIZE is the output's size in adapters: 1 for a merge to the inputs' rank, N for N ranks added up.
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def main() -> None:
    out, size, *folders = sys.argv[1:]
    loaded = [load_file(Path(folder) / "adapter_model.safetensors") for folder in folders]
    result = {
        f"{name}.{copy}": torch.clone(tensor)
        for copy in range(int(size))
        for name, tensor in loaded[copy].items()
    }
    Path(out).mkdir(parents=True, exist_ok=True)
    save_file(result, Path(out) / "adapter_model.safetensors", metadata={"format": "pt"})


if __name__ == "__main__":
    main()
