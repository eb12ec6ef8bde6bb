"""What a run of the tests says of tests that could not run."""

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def test_missing_real_adapters_are_said_aloud(tmp_path: Path) -> None:
    asking = "tests/cli/test_recordings.py::test_recordings_are_the_output_of_today"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", asking],
        env={**os.environ, "LORA_MERGE_SHARED": str(tmp_path / "nothing")},
        cwd=HERE.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0
    assert "NOT TESTED" in done.stdout and asking in done.stdout
    assert "set LORA_MERGE_SHARED" in done.stdout
