"""The least a merge could do: import torch, load the files, save one output of the same size."""

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def main() -> None:
    out, *folders = map(Path, sys.argv[1:])
    loaded = [load_file(folder / "adapter_model.safetensors") for folder in folders]
    out.mkdir(parents=True, exist_ok=True)
    result = {name: torch.clone(tensor) for name, tensor in loaded[0].items()}
    save_file(result, out / "adapter_model.safetensors", metadata={"format": "pt"})


if __name__ == "__main__":
    main()
