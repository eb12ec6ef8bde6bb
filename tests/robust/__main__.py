"""`python -m tests.robust --cases 20000`: the campaign of damaged inputs at any length."""

import argparse
import sys
import tempfile
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

from robust.campaign import main  # noqa: E402 - found only now

if __name__ == "__main__":  # not where a worker loads it
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="Number of the first case.")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        sys.exit(bool(main(options.cases, options.seed, options.first, Path(folder).resolve())))
