"""Merge methods against a bare load-and-save script, and against PEFT on one module.

    python benchmarks/merge.py [--work DIR] [--rounds 3] [--methods svd,cat,...] [--peft]

First, for four r=16 adapters of Llama-3-8B's shape, the ratio of whole-process times (aims: 2.0 for
svd and cat, 4.0 for the rest). Then, with --peft, one 4096 x 4096 module: PEFT's svd and ties_svd
against the same merge here, in one process, turn by turn.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from llama_shapes import make_adapters
from processes import compare

HERE = Path(__file__).parent
RANK = 16
AIMS = {"svd": 2.0, "cat": 2.0}
METHODS = ("svd", "cat", "tsv", "iso-c", "iso-cts", "ctm", "wudi", "core-ties", "knots-ties")
# Ranking entries of all modules together takes more passes over the files; this is one per module.
ONE_PASS = ("-p", "scope=tensor")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    default = Path(tempfile.gettempdir()) / "lora-merge-bench"
    parser.add_argument("--work", type=Path, default=default)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--peft", action="store_true")
    arguments = parser.parse_args()
    work: Path = arguments.work
    adapters = list(map(str, make_adapters(work / "adapters", 4, RANK)))
    for method in filter(None, arguments.methods.split(",")):
        command = [sys.executable, "-m", "lora_merge", "merge", *adapters, "-M", method]
        command += ["--force", "-o", str(work / "merged")]
        command += [] if method == "cat" else ["--rank", str(RANK)]
        command += ONE_PASS if method.endswith("ties") else ()
        size = str(len(adapters)) if method == "cat" else "1"
        bare = [sys.executable, str(HERE / "bare.py"), str(work / "bare"), size, *adapters]
        ratio, ours, theirs = compare(command, bare, arguments.rounds)
        print(
            f"{method:12} {ours.seconds:6.2f} s, bare {theirs.seconds:5.2f} s, ratio {ratio:5.2f} "
            f"(aim {AIMS.get(method, 4.0)}), peak {ours.peak_bytes / 1e6:.0f} MB",
            flush=True,
        )
    if arguments.peft:
        _against_peft(adapters)


def _against_peft(adapters: list[str], module: str = "model.layers.0.self_attn.q_proj") -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from torch import nn

    from lora_merge.adapters.adapter import Adapter
    from lora_merge.adapters.alignment import align, read_stacks
    from lora_merge.merge.methods.method import Job
    from lora_merge.merge.methods.registry import find_method
    from lora_merge.merge.pipeline import finish, merge_stack
    from lora_merge.merge.recipe.recipe import Semantics

    alignment = align([Adapter.from_pretrained(a) for a in adapters])
    chosen = next(m for m in alignment.modules if m.name == module)
    names = [f"a{i}" for i in range(len(adapters))]
    model = nn.ModuleDict({"proj": nn.Linear(4096, 4096, bias=False)})
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=["proj"])
    wrapped = get_peft_model(model, config, adapter_name=names[0])
    for name in names[1:]:
        wrapped.add_adapter(name, config)
    layer = wrapped.base_model.model["proj"]
    for index, name in enumerate(names):
        a, b = alignment.adapters[index].read(module)
        layer.lora_A[name].weight.data = a.float()
        layer.lora_B[name].weight.data = b.float()

    def theirs(kind: str, **options: float) -> Callable[[], None]:
        def run() -> None:
            wrapped.add_weighted_adapter(
                names, [1.0] * 4, "merged", combination_type=kind, svd_rank=RANK, **options
            )
            wrapped.delete_adapter("merged")

        return run

    def ours(method: str, parameters: dict[str, object]) -> Callable[[], None]:
        row = find_method(method)
        weights = torch.ones(4, dtype=torch.float64)

        def run() -> None:
            stack = next(read_stacks(alignment, chosen))
            job = Job(module, RANK if row.makes_rank else None, weights, 0)
            finish(merge_stack(stack, job, row, row.parse(parameters), Semantics()), RANK)

        return run

    ties: dict[str, object] = {"density": 0.2, "compat": "peft"}
    pairs = [
        ("svd", theirs("svd"), ours("svd", {})),
        ("ties_svd", theirs("ties_svd", density=0.2), ours("ties", ties)),
    ]
    for name, peft_run, our_run in pairs:
        our_run()
        our_seconds = statistics.median(_seconds(our_run) for _ in range(5))
        peft_seconds = _seconds(peft_run)
        print(
            f"one 4096 x 4096 module, {name}: PEFT {peft_seconds:.2f} s, here {our_seconds:.4f} s, "
            f"{peft_seconds / our_seconds:.0f} times faster",
            flush=True,
        )


def _seconds(run: Callable[[], None]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
