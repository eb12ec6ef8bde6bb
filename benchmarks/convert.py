"""Converting PEFT's tuners to LoRA: our recipes against `peft.convert_to_lora`.

    python benchmarks/convert.py --size 4096

Both are given one module of size x size and the rank at which the form is exact. PEFT's time is its
conversion in memory (a dense SVD); ours is from file to file. The error is that of the resulting
delta against the tuner's own.
"""

import argparse
import resource
import tempfile
import time
import warnings
from collections import OrderedDict
from pathlib import Path

import peft
import torch
from safetensors.torch import save_file
from torch import nn

from lora_merge import open_adapter
from lora_merge.reshape.convert import plan_conversion

FORMS = {
    "LoHa": ("LoHaConfig", {"r": 8, "alpha": 8}, 64),
    "LoKr": ("LoKrConfig", {"r": 2, "alpha": 2}, 128),
    "VeRA": ("VeraConfig", {"r": 256}, 256),
    "MiSS": ("MissConfig", {"r": 64}, 64),
}


def trained(name: str, size: int, folder: Path) -> peft.PeftModel:
    kind, fields, _ = FORMS[name]
    torch.manual_seed(0)
    base = nn.Sequential(OrderedDict(layer=nn.Linear(size, size, bias=False)))
    (folder / "base").mkdir()
    save_file(base.state_dict(), folder / "base" / "model.safetensors")
    model = peft.get_peft_model(base, getattr(peft, kind)(target_modules=["layer"], **fields))
    for key, parameter in model.named_parameters():
        if "base_layer" not in key:
            nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder / "adapter", save_embedding_layers=False)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=2048)
    parser.add_argument("--forms", nargs="*", default=list(FORMS))
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    print(f"{given.size} x {given.size}, {torch.get_num_threads()} threads")
    print("| form | rank | peft.convert_to_lora | convert | ratio | error of PEFT | of ours |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name in given.forms:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            model, rank = trained(name, given.size, folder), FORMS[name][2]
            layer = model.base_model.model.layer
            with torch.no_grad():
                delta = (layer(torch.eye(given.size)) - layer.base_layer(torch.eye(given.size))).mT
            start = time.perf_counter()
            adapter = open_adapter(folder / "adapter", base=folder / "base")
            plan_conversion(adapter).run(folder / "ours")
            ours = time.perf_counter() - start
            start = time.perf_counter()
            _, state = peft.convert_to_lora(model, rank=rank)
            theirs = time.perf_counter() - start
            (stack,) = open_adapter(folder / "ours").stacks("layer")
            errors = [_error(stack.delta(), delta), _error(_product(state), delta)]
        print(
            f"| {name} | {rank} | {theirs:.2f} s | {ours:.3f} s | {theirs / ours:.0f} x "
            f"| {errors[1]:.1e} | {errors[0]:.1e} |"
        )
    print(
        f"peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f} GB of both together"
    )


def _product(state: dict[str, torch.Tensor]) -> torch.Tensor:
    a = next(t for k, t in state.items() if "lora_A" in k)
    b = next(t for k, t in state.items() if "lora_B" in k)
    return b @ a


def _error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


if __name__ == "__main__":
    main()
