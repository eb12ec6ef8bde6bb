"""TIES and DARE-TIES in delta space against PEFT's `ties_svd` and `dare_ties_svd`.

    python benchmarks/ties.py [--size 4096] [--adapters 4] [--rank 16] [--rounds 3] [--threads N]
                              [--rules ties ...]

One module, the same factors for both; each measurement is a process of its own, and the two take
turns. Time is that of the merge alone (imports and making the factors left out); memory is the peak
resident size during the merge above the resident size before it. Both write the same rank. Ours has
one thread, as every module has in a merge (parallelism is across modules); PEFT has all.

"ties, ranked globally" is the default of `lora-merge merge -M ties`: magnitudes of all modules are
ranked together. Ours then merges three modules; its time is a third of that.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

DENSITY = 0.2
GLOBAL = "ties, ranked globally"
RULES = {"ties": "ties_svd", "dare-ties": "dare_ties_svd", GLOBAL: "ties_svd"}
MODULES = 3  # that are ranked together
AIM_SPEED, AIM_MEMORY = 20, 0.1


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--adapters", type=int, default=4)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=0, help="PEFT's; 0: as many as torch likes")
    parser.add_argument("--rules", nargs="+", choices=RULES, default=list(RULES))
    parser.add_argument("--worker", nargs=2, metavar=("WHO", "RULE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        _work(*arguments.worker, arguments)
        return
    for rule in arguments.rules:
        theirs = RULES[rule]
        pairs = [(_measure("ours", rule), _measure("peft", rule)) for _ in range(arguments.rounds)]
        middle = [
            {key: statistics.median(pair[side][key] for pair in pairs) for key in pairs[0][side]}
            for side in (0, 1)
        ]
        ours, peft = middle
        speed = statistics.median(other["seconds"] / own["seconds"] for own, other in pairs)
        print(
            f"{rule} {arguments.size} x {arguments.size}, {arguments.adapters} x "
            f"r{arguments.rank} -> r{arguments.rank}: "
            f"{ours['seconds']:.2f} s, {ours['megabytes']:.0f} MB; "
            f"peft {theirs} {peft['seconds']:.1f} s, {peft['megabytes']:.0f} MB: "
            f"{speed:.0f} x faster (aim {AIM_SPEED}), "
            f"{ours['megabytes'] / peft['megabytes']:.3f} of the memory (aim {AIM_MEMORY}); "
            f"energy kept {ours['kept']:.5f}, peft {peft['kept']:.5f}",
            flush=True,
        )


def _measure(who: str, rule: str) -> dict[str, float]:
    command = [sys.executable, __file__, "--worker", who, rule, *sys.argv[1:]]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    result: dict[str, float] = json.loads(output.splitlines()[-1])
    return result


def _work(who: str, rule: str, arguments: argparse.Namespace) -> None:
    import torch

    if who == "ours":
        torch.set_num_threads(1)
    elif arguments.threads:
        torch.set_num_threads(arguments.threads)
    random = torch.Generator().manual_seed(0)
    size, rank = arguments.size, arguments.rank
    factors = [
        (
            torch.randn(rank, size, generator=random) * size**-0.5,
            torch.randn(size, rank, generator=random) * 0.02,
            2.0,
        )
        for _ in range(arguments.adapters)
    ]
    together = who == "ours" and rule == GLOBAL
    makers = {"ours": _ours_together if together else _ours, "peft": _peft}
    work = makers[who](rule, factors, rank)
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = _resident("VmRSS")
    start = time.perf_counter()
    result = work()
    seconds = (time.perf_counter() - start) / (MODULES if together else 1)
    peak = _resident("VmHWM") - before
    print(json.dumps({"seconds": seconds, "megabytes": peak / 1e6, "kept": _kept(rule, result)}))


def _ours(rule: str, factors: list[Any], rank: int) -> Callable[[], Any]:
    from lora_merge.adapters.rank_stack import RankStack
    from lora_merge.merge.elementwise.delta import merge_delta
    from lora_merge.merge.elementwise.rule import preset

    stack = RankStack.of(factors)
    chosen = preset(rule, compat="peft", density=DENSITY)
    keys = range(len(factors))

    def work() -> Any:
        merged = merge_delta(stack, chosen, [1.0] * len(factors), rank=rank, keys=keys)
        return merged.retained

    return work


def _ours_together(rule: str, factors: list[Any], rank: int) -> Callable[[], Any]:
    import torch

    from lora_merge.adapters.rank_stack import RankStack
    from lora_merge.merge.methods.method import Job
    from lora_merge.merge.methods.registry import find_method
    from lora_merge.merge.pipeline import merge_stack, prepare_view
    from lora_merge.merge.recipe.recipe import Semantics

    method = find_method("ties")
    options = method.parse({"density": DENSITY})
    weights = torch.ones(len(factors), dtype=torch.float64)
    views = [
        (RankStack.of([(a.roll(i, 1), b, s) for a, b, s in factors]), Job(str(i), rank, weights, 0))
        for i in range(MODULES)
    ]

    def survey(visit: Callable[[Any, Any], None]) -> None:
        for stack, job in views:
            visit(*prepare_view(stack, job, method, Semantics()))

    def work() -> Any:
        shared = method.prepare(survey, options)
        merged = [
            merge_stack(stack, replace(job, shared=shared), method, options, Semantics())
            for stack, job in views
        ]
        return merged[0].outcome.energy

    return work


def _peft(rule: str, factors: list[Any], rank: int) -> Callable[[], Any]:
    import torch
    from peft import LoraConfig, get_peft_model

    size = factors[0][0].shape[1]
    base = torch.nn.Sequential()
    base.add_module("proj", torch.nn.Linear(size, size, bias=False))
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["proj"])
    model = get_peft_model(base, config, adapter_name="0")
    for index in range(1, len(factors)):
        model.add_adapter(str(index), config)
    layer = model.base_model.model.proj
    names = [str(index) for index in range(len(factors))]
    for name, (a, b, _) in zip(names, factors, strict=True):
        layer.lora_A[name].weight.data.copy_(a)
        layer.lora_B[name].weight.data.copy_(b)

    def work() -> Any:
        model.add_weighted_adapter(
            names, [1.0] * len(names), "merged", RULES[rule], svd_rank=rank, density=DENSITY
        )
        return layer

    return work


def _kept(rule: str, result: Any) -> float:
    """Share of the merged delta's energy in the result; for PEFT recomputed outside the timing."""
    if isinstance(result, float):
        return result
    if rule == "dare-ties":
        return float("nan")  # its mask is gone
    import torch
    from peft.utils.merge_utils import ties

    names = [name for name in result.lora_A if name != "merged"]
    with torch.no_grad():
        deltas = [result.get_delta_weight(name) for name in names]
        dense = ties(deltas, torch.ones(len(names)), DENSITY)
        merged = result.get_delta_weight("merged")
        return 1 - float((dense - merged).square().sum() / dense.square().sum())


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


if __name__ == "__main__":
    main()
