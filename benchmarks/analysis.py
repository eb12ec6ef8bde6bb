"""`spectra`, `resize --budget` and `compare` against the least that must be done for them.

    python benchmarks/analysis.py [--work DIR] [--rounds 5] [--many 32]

Whole processes on adapters of Llama-3-8B's shape: `spectra` of one r=64 adapter against importing
torch and reading the file; `resize --budget` of one r=16 adapter against a bare load-and-save
script; `compare` of many r=16 adapters against importing torch and reading them.
"""

import argparse
import sys
import tempfile
from pathlib import Path

from llama_shapes import make_adapters
from processes import compare

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


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--work", type=Path, default=Path(tempfile.gettempdir()) / "lora-merge-bench"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--many", type=int, default=32)
    arguments = parser.parse_args()
    work: Path = arguments.work
    wide = make_adapters(work / "adapters", 1, 64)
    _report("spectra, one r=64", ["spectra", *wide, "--json"], _read(wide), 2, arguments.rounds)
    one = make_adapters(work / "adapters", 1, 16)
    out = work / "resized"
    bare = [sys.executable, str(HERE / "bare.py"), str(work / "bare"), "1", *map(str, one)]
    resize = ["resize", *one, "-o", out, "--budget", "x0.5", "--force"]
    _report("resize --budget x0.5, one r=16", resize, bare, 3, arguments.rounds)
    if arguments.many:
        many = make_adapters(work / "adapters", arguments.many, 16)
        title = f"compare, {arguments.many} of r=16"
        _report(title, ["compare", *many, "--json"], _read(many), 4, arguments.rounds)


def _read(folders: list[Path]) -> list[str]:
    return [sys.executable, "-c", READ, *map(str, folders)]


def _report(title: str, ours: list[object], bare: list[str], aim: float, rounds: int) -> None:
    ratio, mine, theirs = compare([*COMMAND, *map(str, ours)], bare, rounds)
    print(
        f"{title}: {mine.seconds:.2f} s, bare {theirs.seconds:.2f} s, ratio {ratio:.2f} "
        f"(aim {aim:g}); peak {mine.peak_bytes / 1e6:.0f} MB, bare {theirs.peak_bytes / 1e6:.0f} MB"
    )


if __name__ == "__main__":
    main()
