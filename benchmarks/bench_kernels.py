"""What gated mixtures cost beside their base model: every row of the table in docs/kernels.md.

    python benchmarks/bench_kernels.py                        on a GPU, Llama-3-8B's shape, all rows
    python benchmarks/bench_kernels.py --device cpu --small   the harness itself, on tiny shapes
    python benchmarks/bench_kernels.py --device cpu --layers 1 --only decode-1-dense decode-1-top2

Weights and adapters are random, and no network is needed. All candidates of a row take turns in one
process; times are medians, and ratios are to the same base model without adapters (or to what the
row names). One JSON file per device goes to benchmarks/results/; a candidate that fails is recorded
with its error. `python benchmarks/kernel_table.py` makes the table in docs/kernels.md from them.
"""

import argparse
import gc
import json
import platform
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from kernel_cases import CASES, Case
from kernel_work import KINDS, Setting, setting_of
from transformers import logging

import lora_merge
from lora_merge.kernels.gated_stack import dispatch
from lora_merge.machine.timing import Timing, measure

RESULTS = Path(__file__).parent / "results"


def row_of(setting: Setting, case: Case) -> dict[str, Any]:
    """Times of all candidates of a case; those that fail are named with their errors."""
    work, errors, results = KINDS[case.kind](setting, case), {}, {}
    for name, call in list(work.items()):
        try:
            dispatch.forget()
            results[name] = call()
            setting.sync()
            if dispatch.failed():  # eager ran instead
                raise RuntimeError(str(dispatch.failed()))
        except Exception as error:
            errors[name] = f"{type(error).__name__}: {error}"[:500]
            del work[name]
    slow = case.kind in ("generate", "training", "cluster")
    graph = case.graph and setting.device.type == "cuda"
    rounds = min(setting.rounds, 3) if slow else setting.rounds
    timings: dict[str, Timing] = {}
    try:
        timings = measure(work, setting.device, rounds=rounds, least=0.2, graph=graph)
    except Exception as error:
        errors["measure"] = f"{type(error).__name__}: {error}"[:500]
    reference = case.reference
    row: dict[str, Any] = {
        "case": asdict(case), "graph": graph, "errors": errors,
        "seconds": {name: asdict(timing) for name, timing in timings.items()},
        "far": _far(results), "ratios": {},
    }  # fmt: skip
    if reference in timings:
        row["ratios"] = {
            name: case.ratio(timing.median, timings[reference].median)
            for name, timing in timings.items()
            if name != reference
        }
    if setting.device.type == "cuda" and timings:
        best = min((n for n in timings if n != reference), key=lambda n: timings[n].median)
        row["profile"] = {
            name: profile(work[name]) for name in (timings if setting.profile_all else [best])
        }
    return row


def _far(results: dict[str, Any]) -> dict[str, float]:
    """How far each candidate's logits are from eager's, relative to the largest."""
    logits = {n: r.logits.float() for n, r in results.items() if hasattr(r, "logits")}
    if "eager" not in logits:
        return {}
    plain = logits["eager"]
    return {
        name: float((value - plain).abs().max() / plain.abs().max())
        for name, value in logits.items()
        if name != "eager"
    }


def profile(call: Callable[[], Any]) -> list[tuple[str, int, float]]:
    """Name, launches and microseconds of the kernels that took longest, all of them first."""
    activity = torch.profiler.ProfilerActivity.CUDA
    with torch.profiler.profile(activities=[activity]) as record:
        call()
        torch.cuda.synchronize()
    events = [(e.key, e.count, e.device_time_total) for e in record.key_averages()]
    events.sort(key=lambda event: -event[2])
    total = sum(count for _, count, _ in events), sum(time for _, _, time in events)
    named = [("total", *total), *events[:20]]
    return [(name[:110], count, round(time, 1)) for name, count, time in named]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default)
    parser.add_argument("--small", action="store_true", help="tiny shapes, to try the harness")
    parser.add_argument("--layers", type=int, help="layers of the base model")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--only", nargs="*", choices=[case.name for case in CASES])
    parser.add_argument("--profile-all", action="store_true", help="not of the fastest alone")
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    parser.add_argument("--work", type=Path, help="where adapters are made and kept")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.device == "cuda" and default == "cpu":
        parser.error("there is no CUDA device here; --device cpu --small tries the harness")
    warnings.filterwarnings("ignore")
    logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as folder:
        setting = setting_of(options, options.work or Path(folder))
        document = describe(setting, options)
        path = options.out / f"{document['name']}.json"
        options.out.mkdir(parents=True, exist_ok=True)
        for case in CASES:
            if options.only and case.name not in options.only:
                continue
            start = time.perf_counter()
            try:
                row = row_of(setting, case)
            except Exception as error:  # one row must not lose the others
                row = {"case": asdict(case), "errors": {"all": f"{type(error).__name__}: {error}"}}
            document["rows"].append(row)
            took = time.perf_counter() - start
            print(case.name, row.get("ratios", {}), row["errors"], f"({took:.0f} s)", flush=True)
            path.write_text(json.dumps(document, indent=1) + "\n")
            gc.collect()
            if setting.device.type == "cuda":
                torch.cuda.empty_cache()
    print(path)


def describe(setting: Setting, options: argparse.Namespace) -> dict[str, Any]:
    """What the numbers were measured on."""
    name = dispatch.device_name(setting.device)
    layers = setting.config.num_hidden_layers
    suffix = "-small" if options.small else f"-{layers}-layers" if layers != 32 else ""
    from importlib.metadata import version

    return {
        "name": f"kernels-{name}{suffix}",
        "device": name,
        "cores": torch.get_num_threads() if setting.device.type == "cpu" else None,
        "machine": platform.machine(),
        "versions": {
            **dispatch.versions(), "transformers": version("transformers"),
            "peft": version("peft"), "lora-merge": lora_merge.__version__,
        },
        "small": options.small,
        "layers": layers,
        "dtype": str(setting.dtype).removeprefix("torch."),
        "rows": [],
    }  # fmt: skip


if __name__ == "__main__":
    main()
