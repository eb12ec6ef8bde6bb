"""Settings and fixtures for all tests."""

import os
import signal
from importlib.util import find_spec
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# Deterministic, so that a red run can be repeated; no deadline, because CI machines are shared.
settings.register_profile(
    "ci",
    deadline=None,
    derandomize=True,
    max_examples=40,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

# A shell's background job ignores Ctrl-C, and so would the commands that tests interrupt.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


SHARED = Path(os.environ.get("LORA_MERGE_SHARED", Path(__file__).resolve().parents[2] / "shared"))
HAS_SHARED = (SHARED / "adapters").is_dir()
NO_SHARED = "no real adapters on this machine (set LORA_MERGE_SHARED)"


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real adapters and models, where the machine has them (LORA_MERGE_SHARED or ../shared)."""
    if not HAS_SHARED:
        pytest.skip(NO_SHARED)
    return SHARED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say what was left out: a green run that saw less than it could must not look complete."""
    skipped = terminalreporter.stats.get("skipped", [])
    asked = [f"  {report.nodeid}" for report in skipped if NO_SHARED in str(report.longrepr)]
    left_out = []
    if asked:
        left_out += [f"{len(asked)} tests on real adapters: no {SHARED}", *asked]
        left_out += ["  set LORA_MERGE_SHARED to a folder that holds adapters/ and arena/"]
    if not find_spec("triton"):
        left_out += ["all tests of the Triton kernels: triton is not installed"]
    if not find_spec("ray"):
        left_out += ["merges on a Ray cluster: ray is not installed"]
    if left_out:
        terminalreporter.section("NOT TESTED", sep="=", yellow=True, bold=True)
        for line in left_out:
            terminalreporter.write_line(line, yellow=True)
