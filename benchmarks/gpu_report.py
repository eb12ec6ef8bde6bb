"""A pytest plugin: one line on stdout for each test as it ends, with a failure's last line."""

import sys
from typing import Any


def pytest_runtest_logreport(report: Any) -> None:
    """REPORT, outcome, name and last line, between tabs."""
    if report.when != "call" and report.outcome == "passed":
        return
    if report.when == "teardown" and report.outcome == "skipped":
        return
    crash = getattr(report.longrepr, "reprcrash", None)
    text = crash.message if crash is not None else str(report.longrepr or "")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    # An assertion's first line says it; of a compiler's log the last does.
    last = lines[0] if lines and "assert" in lines[0] else lines[-1] if lines else ""
    name = report.nodeid.rpartition("/")[2]
    print(f"\nREPORT\t{report.outcome}\t{name}\t{last[:300]}", flush=True, file=sys.__stdout__)
