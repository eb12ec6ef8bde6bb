"""`merge` killed at any moment: the output that was there, or the new one, and nothing between."""

import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from builders import save_adapter
from lora_merge.files.stamp import finish_stamp

# Forks a process per moment, so that torch is imported once. A moment is the n-th thing that a run
# asks of the system; 0 lets it end, and prints how many there are.
PROGRAM = """
import os, signal, sys
import torch, lora_merge.merge.run, lora_merge.merge.methods.registry, lora_merge.cli.views.merge
from lora_merge.cli.app import run

def go(moment):
    count = 0
    def hook(event, _):
        nonlocal count
        if event.startswith(("open", "os.", "shutil.", "tempfile.", "ctypes.")):
            count += 1
            if count == moment:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)
    code = run(sys.argv[1:])
    print(count, flush=True)
    os._exit(code)

for line in sys.stdin:
    child = os.fork()
    if child == 0:
        sys.stdout = sys.stderr if int(line) else sys.__stdout__
        go(int(line))
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_merge_killed_at_any_moment_loses_nothing(tmp_path: Path) -> None:
    three = [str(save_adapter(tmp_path / n, seed=i)) for i, n in enumerate("abc")]
    out = save_adapter(tmp_path / "out", seed=9)
    finish_stamp(out)
    arguments = ["merge", *three, "-M", "svd", "--rank", "energy:0.9", "--jobs", "1", "--json"]
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *arguments, "--force", "-o", str(out)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdin is not None and process.stdout is not None

    def run(moment: int) -> list[str]:
        """What is printed until a process has ended; its exit code comes last."""
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(f"{moment}\n")
        process.stdin.flush()
        lines = [process.stdout.readline().strip()]
        while lines[-1] not in ("0", str(-signal.SIGKILL)):
            assert process.poll() is None, lines
            lines.append(process.stdout.readline().strip())
        return lines

    with process:
        before = files(out)
        count = int(run(0)[-2])
        finished = files(out)
        assert finished != before
        # Some moments of the merge, and more at its end, where directories change places.
        moments = random.Random(0).sample(range(1, count - 30), 5)
        ends = set()
        for moment in (*moments, *range(count, count - 31, -5)):
            for folder in (out, *tmp_path.glob("*.tmp")):
                shutil.rmtree(folder)
            out.mkdir()
            for name, content in before.items():
                (out / name).write_bytes(content)
            assert run(moment) == [str(-signal.SIGKILL)]
            now = files(out)
            assert now in (before, finished), moment
            ends.add(now == finished)
        assert ends == {True, False}  # kills on both sides of the exchange
        assert list(tmp_path.glob(".out.*.tmp"))  # what the last kill left; the next run sweeps it
        assert run(0)[-1] == "0"
        process.stdin.close()
    assert files(out) == finished
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "c", "out"]
