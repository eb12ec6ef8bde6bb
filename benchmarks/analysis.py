"""`spectra`, `resize --budget`, `compare` and `report` against the least to be done for them.

    python benchmarks/analysis.py [--work DIR] [--rounds 5] [--many 32] [--only WORD]
        [--out FILE.md]

Whole processes on adapters of Llama-3-8B's shape: `spectra` of one r=64 adapter against importing
torch and reading the file; `resize --budget` of one r=16 adapter against a bare load-and-save
script; `compare` of many r=16 adapters against importing torch and reading them; `report` of three
r=16 adapters against `spectra` and then `compare` of the same. `--out` writes the table that stands
in benchmarks/results/analysis.md.
"""

import argparse
import os
import platform
import shlex
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llama_shapes import make_adapters
from processes import Run, compare

HERE = Path(__file__).parent
COMMAND = [sys.executable, "-m", "lora_merge"]
READ = (
    "import sys, torch\n"
    "from safetensors import safe_open\n"
    "for folder in sys.argv[1:]:\n"
    "    file = safe_open(folder + '/adapter_model.safetensors', 'pt', backend='pread')\n"
    "    for name in file.keys():\n"
    "        file.get_tensor(name)\n"
)


@dataclass(frozen=True)
class Result:
    """One command against its bare script."""

    title: str
    aim: float
    ratio: float
    ours: Run
    bare: Run

    @property
    def cells(self) -> list[str]:
        """A row of the table."""
        return [
            self.title,
            f"{self.ratio:.2f}",
            f"{self.aim:g}",
            f"{self.ours.seconds:.1f} s over {self.bare.seconds:.1f} s",
            f"{self.ours.cpu_seconds:.1f} s over {self.bare.cpu_seconds:.1f} s",
            f"{self.ours.peak_bytes / 1e6:.0f} MB, bare {self.bare.peak_bytes / 1e6:.0f} MB",
        ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--work", type=Path, default=Path(tempfile.gettempdir()) / "lora-merge-bench"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--many", type=int, default=32)
    parser.add_argument("--only", default="", help="comparisons whose title has this word")
    parser.add_argument("--out", type=Path, help="markdown file to write")
    arguments = parser.parse_args()
    results = []
    for title, aim, ours, bare in _tasks(arguments.work, arguments.many):
        if arguments.only not in title:
            continue
        ratio, mine, theirs = compare([*COMMAND, *ours], bare, arguments.rounds)
        results.append(Result(title, aim, ratio, mine, theirs))
        print(" | ".join(results[-1].cells), flush=True)
        if ours[0] == "report":
            print(f"{ours[-1]}: {Path(ours[-1]).stat().st_size / 1e6:.2f} MB")
    if arguments.out:
        arguments.out.write_text(_document(results, arguments.rounds), encoding="utf-8")


def _tasks(work: Path, many: int) -> list[tuple[str, float, list[str], list[str]]]:
    """(title, aim, our arguments, bare command) of every comparison."""
    wide = _texts(make_adapters(work / "adapters", 1, 64))
    one = _texts(make_adapters(work / "adapters", 1, 16))
    read = [sys.executable, "-c", READ]
    copy = [sys.executable, str(HERE / "bare.py"), str(work / "bare"), "1", *one]
    resize = ["resize", *one, "-o", str(work / "resized"), "--budget", "x0.5", "--force"]
    tasks = [
        ("`spectra`, one adapter of r=64", 2.0, ["spectra", *wide, "--json"], [*read, *wide]),
        ("`resize --budget x0.5`, one of r=16", 3.0, resize, copy),
    ]
    three = _texts(make_adapters(work / "adapters", 3, 16))
    both = " && ".join(shlex.join([*COMMAND, name, *three]) for name in ("spectra", "compare"))
    report = ["report", *three, "-o", str(work / "report.html")]
    tasks.append(("`report`, three of r=16", 1.5, report, ["sh", "-c", both]))
    if many:
        folders = _texts(make_adapters(work / "adapters", many, 16))
        title = f"`compare`, {many} of r=16"
        tasks.append((title, 4.0, ["compare", *folders, "--json"], [*read, *folders]))
    return tasks


def _texts(folders: Sequence[Path]) -> list[str]:
    return [str(folder) for folder in folders]


def _document(results: Sequence[Result], rounds: int) -> str:
    import torch

    heads = ["command", "ratio", "aim", "wall time", "CPU time", "peak memory"]
    rows = [heads, ["-"] * len(heads), *(result.cells for result in results)]
    table = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    return f"""# Speed of the analyses

`python benchmarks/analysis.py --rounds {rounds}`: adapters of Llama-3-8B's shape in bfloat16, whole
processes. `spectra` and `compare` stand beside importing torch and reading the same files, `resize`
beside a script that loads and saves, `report` beside `spectra` and then `compare`. Ratios are
medians over rounds taken turn by turn. {os.cpu_count()} CPU cores ({platform.machine()}), torch
{torch.__version__.partition("+")[0]}, load average {os.getloadavg()[2]:.1f} over 15 minutes.

{table}
"""


if __name__ == "__main__":
    main()
