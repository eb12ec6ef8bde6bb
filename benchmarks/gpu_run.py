"""Everything that wants a GPU, in one command and inside a time budget.

    python benchmarks/gpu_run.py --out DIR                     on a GPU, 8 minutes
    python benchmarks/gpu_run.py --out DIR --minutes 4
    python benchmarks/gpu_run.py --device cpu --small --out DIR   a rehearsal

In this order: versions; which kernels compile; the GPU tests, each failure's last line printed as
it happens; what a token costs the host; every row of the table in docs/kernels.md at 8 layers, with
a profile per candidate. A part has a share of the budget and is cut off at its end; the slowest
tests and rows come last, so that they are what a cut leaves out. Results are JSON files in DIR,
written at once. Nothing is installed: what the machine lacks of the required packages (pydantic,
say) is carried along, made with
`pip install --target CARRIED --python-version 3.12 --only-binary :all: pydantic`, and named by
PYTHONPATH=CARRIED.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PACKAGES = (
    "torch", "triton", "transformers", "peft", "numpy", "scipy", "scikit-learn", "safetensors",
    "huggingface-hub", "click", "rich", "pydantic", "pyyaml", "pytest", "hypothesis",
    "pytest-timeout",
)  # fmt: skip
# Fastest first; a file that is cut off loses what is behind it.
TESTS = (
    "test_kernels.py", "test_gate_expand.py", "test_fused.py", "test_tuned.py", "test_in_models.py",
    "../../merge/test_on_gpu.py", "test_grouped.py",
)  # fmt: skip
SHARES = {
    "compile": 0.15,
    "tests": 0.3,
    "host": 0.1,
    "bench": 1.0,
}  # of what is left when the part begins


def lines_of(command: list[str], seconds: float, extra: dict[str, str]) -> Iterator[str]:
    """Lines that a command prints, as they come; it is ended when its time is over."""
    first = [str(ROOT / "src"), str(ROOT / "benchmarks")]
    path = os.pathsep.join([*first, *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **extra}
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    timer = threading.Timer(max(1.0, seconds), process.kill)
    timer.start()
    try:
        assert process.stdout is not None
        yield from (line.rstrip("\n") for line in process.stdout)
    finally:
        alive = timer.is_alive()
        timer.cancel()
        process.kill()
        code = process.wait()
        if process.stdout is not None:
            process.stdout.close()
        if code:
            print(
                f"  exit code {code}" if alive else f"  cut off after {seconds:.0f} s", flush=True
            )


def versions(device: str) -> dict[str, Any]:
    found: dict[str, Any] = {"python": sys.version.split()[0]}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    import torch

    found["cuda"] = torch.version.cuda
    if device == "cuda":
        found["gpu"] = torch.cuda.get_device_name()
        found["capability"] = torch.cuda.get_device_capability()
    try:
        command = ["git", "rev-parse", "HEAD"]
        found["commit"] = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        found["commit"] = None
    return found


def compiled(seconds: float, out: Path, found: dict[str, Any]) -> dict[str, Any]:
    """Whether the kernels compile for this GPU, or for compute capability 9.0."""
    major, minor = found.get("capability", (9, 0))
    command = [
        sys.executable, "benchmarks/compile_matrix.py", "--sample", "--capability",
        str(10 * major + minor), "--out", str(out.resolve()),
    ]  # fmt: skip
    return shown(command, seconds)


def shown(command: list[str], seconds: float) -> dict[str, Any]:
    """A command's lines, printed as they come, the last of them kept."""
    lines = []
    for line in lines_of(command, seconds, {}):
        print(f"  {line}", flush=True)
        lines.append(line)
    return {"lines": lines[-40:]}


def tested(seconds: float, small: bool, device: str) -> dict[str, Any]:
    """The tests of the kernels on the GPU, or in Triton's interpreter; see `gpu_report`."""
    suite = ROOT / "tests" / "kernels" / "triton_suite"
    files = [str((suite / name).resolve()) for name in TESTS[: 1 if small else None]]
    command = [
        sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "gpu_report",
        "--tb=short", *files,
    ]  # fmt: skip
    if importlib.util.find_spec("pytest_timeout") is None:  # the configuration names its option
        command[4:4] = ["-W", "ignore::pytest.PytestConfigWarning"]
    if small:
        command += ["-k", "expand and not every"]
    extra = {"TRITON_INTERPRET": "1"} if device == "cpu" else {}
    result: dict[str, Any] = {"passed": 0, "skipped": 0, "failed": [], "other": []}
    for line in lines_of(command, seconds, extra):
        kind, _, rest = line.partition("\t")
        if kind == "REPORT":
            outcome, name, last = rest.split("\t", 2)
            if outcome == "failed":
                result["failed"].append({"test": name, "last": last})
                print(f"  FAILED {name}: {last}", flush=True)
            else:
                result[outcome] += 1
        else:
            result["other"] = [*result["other"], line][-30:]
    counts = result["passed"], len(result["failed"]), result["skipped"]
    print("  {} passed, {} failed, {} skipped".format(*counts), flush=True)
    if not any(counts):
        print("\n".join(f"  {line}" for line in result["other"]), flush=True)
    return result


def measured(seconds: float, out: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Every row of the table; the file has all candidates' times and kernels."""
    command = [
        sys.executable, "benchmarks/bench_kernels.py", "--device", options.device, "--out",
        str(out.resolve()),
        "--layers", "2" if options.small else "8", "--rounds", "3" if options.small else "5",
        "--no-compile", "--profile-all",
    ]  # fmt: skip
    if options.small:
        command += ["--small"]
    return shown(command, seconds)


def host(seconds: float, out: Path, options: argparse.Namespace) -> dict[str, Any]:
    """What a decoded token costs the host, by part."""
    command = [
        sys.executable, "benchmarks/host_token.py", "--device", options.device, "--out",
        str(out.resolve()), "--layers", "2" if options.small else "8",
        "--rounds", "4" if options.small else "40",
    ]  # fmt: skip
    return shown(command, seconds)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny shapes and few tests")
    parser.add_argument("--minutes", type=float, default=8.0, help="budget [default: 8]")
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    options = parser.parse_args()
    end = time.monotonic() + 60 * options.minutes
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "gpu-run.json"
    document: dict[str, Any] = {"versions": versions(options.device), "parts": {}}
    print(json.dumps(document["versions"]), flush=True)
    parts = {
        "compile": lambda s: compiled(s, options.out, document["versions"]),
        "tests": lambda s: tested(s, options.small, options.device),
        "host": lambda s: host(s, options.out, options),
        "bench": lambda s: measured(s, options.out, options),
    }
    for name, part in parts.items():
        share = SHARES[name] * max(0.0, end - time.monotonic())
        print(f"{name}: at most {share:.0f} s", flush=True)
        start = time.monotonic()
        try:
            result = part(share)
        except Exception as error:  # one part must not lose the others
            result = {"error": f"{type(error).__name__}: {error}"}
            print(f"  {result['error']}", flush=True)
        result["seconds"] = round(time.monotonic() - start, 1)
        document["parts"][name] = result
        path.write_text(json.dumps(document, indent=1) + "\n")
    print(path, flush=True)


if __name__ == "__main__":
    main()
