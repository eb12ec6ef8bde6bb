"""What a merge of many adapters costs, against a bare script that loads and saves the same files.

    python benchmarks/many.py [--adapters 64] [--more 256] [--rounds 3] [--rows svd,wudi-iso,...]

Adapters of rank 16 on four layers of Llama-3-8B's shape; results of rank 16; whole processes, turn
by turn. Ratios are given for wall time and for CPU seconds: the latter hold on a busy machine.
`--more` times the same rows with more adapters; `--energy` compares `svd` with `svd --exact` in the
energy that is kept.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from llama_shapes import make_adapters
from processes import Run, compare

HERE = Path(__file__).parent
RANK, LAYERS = 16, 4
ROWS = {
    "svd": (["merge", "-M", "svd", "--scale", "1"], 3.5),
    "wudi-iso": (["merge", "-M", "wudi-iso", "--scale", "1"], 8.0),
    "cluster": (["cluster", "--scale", "1"], 4.0),
    "lego": (["cluster", "--as-published", "--scale", "1"], 4.0),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    default = Path(tempfile.gettempdir()) / "lora-merge-bench"
    parser.add_argument("--work", type=Path, default=default)
    parser.add_argument("--adapters", type=int, default=64)
    parser.add_argument("--more", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", default=",".join(ROWS))
    parser.add_argument("--energy", action="store_true", help="the energy kept, beside --exact")
    arguments = parser.parse_args()
    work: Path = arguments.work
    largest = max(arguments.adapters, arguments.more)
    adapters = list(map(str, make_adapters(work / "many", largest, RANK, LAYERS)))
    few = adapters[: arguments.adapters]
    before: dict[str, Run] = {}
    for count in filter(None, (arguments.adapters, arguments.more)):
        chosen = adapters[:count]
        bare = [sys.executable, str(HERE / "bare.py"), str(work / "bare"), "1", *chosen]
        for row in arguments.rows.split(","):
            words, aim = ROWS[row]
            ratio, ours, theirs = compare(_command(words, chosen, work), bare, arguments.rounds)
            line = (
                f"{row:9} {count:4} adapters: {ours.seconds:6.1f} s, bare {theirs.seconds:5.1f} s, "
                f"{ratio:5.1f} x (aim {aim}); CPU {ours.cpu_seconds:6.1f} s, "
                f"{ours.cpu_seconds / theirs.cpu_seconds:5.1f} x; "
                f"peak {ours.peak_bytes / 1e6:.0f} MB"
            )
            if row in before:
                grown = ours.cpu_seconds / before[row].cpu_seconds
                line += f"; CPU {grown:.1f} x that of {len(few)} adapters"
            before.setdefault(row, ours)
            print(line, flush=True)
    if arguments.energy:
        quick, exact = (_energy(few, work, *more) for more in ((), ("--exact",)))
        print(f"svd: energy kept {quick:.6f}, exact cut {exact:.6f}: {1 - quick / exact:.2e} less")


def _command(words: list[str], adapters: list[str], work: Path, *more: str) -> list[str]:
    command = [sys.executable, "-m", "lora_merge", *words, *adapters, "--rank", str(RANK)]
    return [*command, "--force", "-o", str(work / "merged-many"), *more]


def _energy(adapters: list[str], work: Path, *more: str) -> float:
    command = _command(ROWS["svd"][0], adapters, work, "--json", *more)
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    kept: float = json.loads(text)["total"]["retained"]
    return kept


if __name__ == "__main__":
    main()
