"""Commands killed, or short of what they need: a few of what `python -m tests.robust` does."""

from pathlib import Path
from random import Random

import pytest

from robust.harms import by_file_size, by_open_files, killed, short_of, stage


@pytest.mark.timeout(600)
def test_nothing_is_lost(tmp_path: Path) -> None:
    with stage(tmp_path) as on:
        ends = [
            *short_of(on, "cat", by_file_size),
            *short_of(on, "report", lambda *_: by_open_files([], [])[::3]),
            *killed(on, "fuse", Random(0), 2),
        ]
    assert len(ends) > 9
    assert not [end for end in ends if end[1]]
