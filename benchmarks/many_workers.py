"""Many adapters, many workers: libraries, Ray, and a simulation of what no machine here can hold.

    python benchmarks/many_workers.py library [--adapters 1000 --layers 2]
    python benchmarks/many_workers.py ray [--adapters 64 --layers 4]
    python benchmarks/many_workers.py simulate [--adapters 10000 --workers 64]

Ratios are of whole processes that take turns. Peak memory is that of a process.
"""

import argparse
import heapq
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from processes import Run, compare
from safetensors.torch import save_file

# Llama-3.2-1B: q_proj and v_proj, (d_out, d_in).
SHAPES = {"q_proj": (2048, 2048), "v_proj": (512, 2048)}
# Llama-3-70B, all linear modules of a layer.
LARGE = {
    "q": (8192, 8192), "k": (1024, 8192), "v": (1024, 8192), "o": (8192, 8192),
    "gate": (28672, 8192), "up": (28672, 8192), "down": (8192, 28672),
}  # fmt: skip
MERGE = [sys.executable, "-m", "lora_merge"]


def make(folder: Path, count: int, layers: int, rank: int) -> list[str]:
    """Random bfloat16 adapters as PEFT directories."""
    refs = []
    for number in range(count):
        random = torch.Generator().manual_seed(number)
        tensors = {}
        for layer in range(layers):
            for name, (d_out, d_in) in SHAPES.items():
                at = f"base_model.model.model.layers.{layer}.self_attn.{name}"
                a = torch.randn(rank, d_in, generator=random) / d_in**0.5
                b = torch.randn(d_out, rank, generator=random) * 0.02
                tensors[f"{at}.lora_A.weight"] = a.bfloat16()
                tensors[f"{at}.lora_B.weight"] = b.bfloat16()
        place = folder / f"{number:05}"
        place.mkdir(parents=True)
        save_file(tensors, place / "adapter_model.safetensors", metadata={"format": "pt"})
        (place / "adapter_config.json").write_text(
            '{"peft_type": "LORA", "base_model_name_or_path": "base", "lora_alpha": 16, '
            f'"r": {rank}, "target_modules": ["q_proj", "v_proj"]}}'
        )
        refs.append(str(place))
    return refs


# The least that anything with all adapters could do: start torch, and read every tensor once.
READ = """
import sys, torch
from pathlib import Path
from safetensors import safe_open
for path in sorted(Path(sys.argv[1]).rglob("*.safetensors")):
    with safe_open(path, framework="pt", backend="pread") as file:
        for name in file.keys():
            file.get_tensor(name)
"""


def library(tmp: Path, adapters: int, layers: int, rounds: int) -> None:
    make(tmp / "pool", adapters, layers, rank=8)
    pool, lib = str(tmp / "pool" / "*"), str(tmp / "library")
    read_pool = [sys.executable, "-c", READ, str(tmp / "pool")]
    pack = [*MERGE, "pack", pool, "-o", lib, *(["--force"])]
    report(f"pack {adapters} adapters / reading them", *compare(pack, read_pool, rounds))
    read_library = [sys.executable, "-c", READ, lib]
    common = ["--rank", "8", "--scale", "1", "--force", "--jobs", "2"]
    for source, refs in (("library", lib), ("directories", pool)):
        merge = [
            *MERGE,
            "merge",
            refs,
            "-M",
            "linear-factors",
            *common,
            "-o",
            str(tmp / f"merged-{source}"),
        ]
        what = f"merge -M linear-factors from {source} / reading the library"
        report(what, *compare(merge, read_library, rounds))


def report(what: str, ratio: float, ours: Run, theirs: Run) -> None:
    print(
        f"{what}: {ratio:.2f} x ({ours.seconds:.1f} s / {theirs.seconds:.1f} s; CPU "
        f"{ours.cpu_seconds / theirs.cpu_seconds:.2f} x), {ours.peak_bytes / 1e9:.2f} GB"
    )


# Two merges in one connected process, so that starting Ray (seconds) is told apart from working.
ON_RAY = """
import sys, time, statistics, os
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
import ray, lora_merge
from lora_merge.merge.shards import ray_engine
pool, out, workers, rounds = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
ray.init(num_cpus=workers, logging_level="ERROR", log_to_driver=False, include_dashboard=False)
recipe = {"merge_method": "svd", "rank": 16, "adapters": [{"adapter": pool}]}
times = {"ray": [], "local": []}
for turn in range(rounds + 1):
    for name, how in (("ray", {"engine": "ray"}), ("local", {"jobs": workers})):
        start = time.perf_counter()
        lora_merge.run_recipe(recipe, f"{out}-{name}", force=True, **how)
        if turn:  # the first plans in the workers and warms the page cache
            times[name].append(time.perf_counter() - start)
ratio = statistics.median(a / b for a, b in zip(times["ray"], times["local"]))
print(f"ray, {workers} workers of one core / one process of {workers} threads: {ratio:.2f} x "
      f"({statistics.median(times['ray']):.2f} s / {statistics.median(times['local']):.2f} s)")
a, b = ((open(f"{out}-{n}/adapter_model.safetensors", "rb").read()) for n in ("ray", "local"))
print("same bytes" if a == b else "OTHER BYTES")

# A task that does nothing but what every task does: plan from the cache, make a folder, send back.
from functools import partial
from lora_merge.merge.recipe.arguments import RunShard
from lora_merge.merge.shards.shard import plan_for_shards
plan, header = plan_for_shards(RunShard(recipe, f"{out}-x", "1/1"))
sent = ray.put((dict(header), os.getcwd()))
empty = ray.remote(ray_engine._run).options(num_cpus=1)
ray.get([empty.remote(sent, (), ()) for _ in range(2 * workers)])
start = time.perf_counter()
ray.get([empty.remote(sent, (), ()) for _ in range(100)])
each = (time.perf_counter() - start) / 100 * workers
print(f"overhead of a task: {1000 * each:.1f} ms of a worker")
"""


def on_ray(tmp: Path, adapters: int, layers: int, rounds: int) -> None:
    make(tmp / "pool", adapters, layers, rank=16)
    arguments = [str(tmp / "pool" / "*"), str(tmp / "out"), "2", str(rounds)]
    subprocess.run([sys.executable, "-c", ON_RAY, *arguments], check=True)


def simulate(adapters: int, workers: int) -> None:
    """Many rank-16 adapters of Llama-3-70B, all linear modules, to rank 16, in shards of modules.

    Two costs of a module with R units: (d_in + d_out) R² of the exact decomposition, and six passes
    of a range finder of 32 columns, (d_in + d_out) R 32 each. Both are timed here, on one thread,
    and grown; a store gives so many bytes a second to all workers together.
    """
    torch.set_num_threads(1)
    rank, columns, passes = 16, 32, 6
    x = torch.randn(2048, 8192)
    exact = _seconds(lambda: x @ x.mT) / x.numel() / len(x)
    sketch = passes * _seconds(lambda: x.mT @ torch.ones(len(x), columns)) / x.numel()
    units = adapters * rank
    widths = [d_out + d_in for d_out, d_in in LARGE.values() for _ in range(80)]
    sizes = [2 * units * width for width in widths]
    print(
        f"{adapters} adapters, {len(widths)} modules of {units} units: {sum(sizes) / 1e12:.1f} TB, "
        f"{2 * max(sizes) / 1e9:.0f} GB for the largest stack in float32"
    )
    for name, each in (("exact", exact * units), ("range finder", sketch)):
        for store in (1e9, 10e9, 100e9):
            ends = [0.0] * workers
            for size in sorted(sizes, reverse=True):
                seconds = each * size / 2 + size / (store / workers)
                heapq.heappush(ends, heapq.heappop(ends) + seconds)
            print(
                f"{name}, store of {store / 1e9:.0f} GB/s: {max(ends) / 3600:.2f} h on {workers} "
                f"workers of one core, of which {sum(sizes) / store / max(ends):.0%} is reading"
            )


def _seconds(work: Callable[[], object]) -> float:
    work()
    times = []
    for _ in range(5):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["library", "ray", "simulate"])
    parser.add_argument("--adapters", type=int)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--workers", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    if given.what == "simulate":
        simulate(given.adapters or 10_000, given.workers)
        return
    tmp = Path(tempfile.mkdtemp())
    try:
        what, count = (library, 1000) if given.what == "library" else (on_ray, 64)
        what(tmp, given.adapters or count, given.layers, given.rounds)
    finally:
        shutil.rmtree(tmp)


if __name__ == "__main__":
    main()
