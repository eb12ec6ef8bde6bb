"""Campaigns at any length.

python -m tests.robust --cases 20000 --log campaign.jsonl   damaged inputs; goes on where it ended
python -m tests.robust --kills 100                          SIGKILLs of all commands that write
python -m tests.robust --shortages                          too small files, disks, limits
"""

import argparse
import sys
import tempfile
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS), str(TESTS / "mixture")]

from robust.campaign import main  # noqa: E402 - found only now
from robust.harms import report  # noqa: E402

if __name__ == "__main__":  # not where a worker loads it
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="Number of the first case.")
    parser.add_argument("--log", type=Path, help="File of results, to go on from.")
    parser.add_argument("--kills", type=int, help="Kill so many runs instead.")
    parser.add_argument("--shortages", action="store_true", help="Files, disks and limits instead.")
    parser.add_argument("--only", help="Of kills and shortages: commands of this name.")
    parser.add_argument("--verbose", action="store_true", help="Print every one of them.")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder).resolve()
        if options.kills or options.shortages:
            sys.exit(report(root, options.kills, options.seed, options.only, options.verbose))
        log = options.log and options.log.resolve()
        sys.exit(bool(main(options.cases, options.seed, options.first, root, log)))
