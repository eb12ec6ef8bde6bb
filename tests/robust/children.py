"""Commands in processes of their own that are killed, or are short of what they need.

A process that has loaded everything forks one for each command, so that a hundred take a minute.
It never computes itself: a fork of a process with threads may hang.
"""

import contextlib
import fcntl
import json
import os
import pkgutil
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from robust.verdicts import Ended

LONGEST = 120.0  # seconds of one command
_LONGEST_OUTPUT = 1 << 20
_LIBRARIES = (
    "matplotlib.backends.backend_agg", "matplotlib.backends.backend_svg", "matplotlib.pyplot",
    "optuna.importance", "sqlalchemy.dialects.sqlite", "tokenizers",
    "transformers.models.llama.modeling_llama", "transformers.models.auto.modeling_auto",
    "transformers.integrations", "sklearn.cluster", "scipy.optimize",
)  # fmt: skip
# What a run asks of the system.
_EVENTS = ("open", "os.", "shutil.", "tempfile.", "ctypes.", "sqlite3.")


@dataclass(frozen=True)
class Harm:
    """What is done to a command.

    Attributes:
        kill_at: SIGKILL at the n-th thing that it asks of the system, counted from 1.
        kill_after: SIGKILL after so many seconds.
        largest_file: Bytes that a file may have (RLIMIT_FSIZE).
        open_files: Files that may be open (RLIMIT_NOFILE).
        disk: Bytes of the file system that the output is on.
    """

    kill_at: int | None = None
    kill_after: float | None = None
    largest_file: int | None = None
    open_files: int | None = None
    disk: int | None = None

    def __str__(self) -> str:
        return ", ".join(
            f"{name} {value}" for name, value in asdict(self).items() if value is not None
        )


@dataclass(frozen=True)
class Run:
    """How a command in a process of its own ended.

    Attributes:
        ended: Its code (-9: killed) and what it wrote.
        events: Things that it asked of the system; 0 if it was killed.
        seconds: What it took.
    """

    ended: Ended
    events: int
    seconds: float


class Children:
    """The process that forks the others. Use as a context manager.

    Args:
        root: Where their output is kept.
        environment: Of all of them.
    """

    def __init__(self, root: Path, environment: dict[str, str]) -> None:
        tests = Path(__file__).resolve().parents[1]
        paths = [str(tests), str(tests / "mixture"), *filter(None, sys.path)]
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "robust.children"],
            env={**os.environ, **environment, "PYTHONPATH": os.pathsep.join(paths)},
            cwd=root / "here",
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, words: Sequence[str], harm: Harm | None = None) -> Run:
        """Run a command to its end, whichever that is."""
        assert self._process.stdin is not None and self._process.stdout is not None
        json.dump({"words": list(words), "harm": asdict(harm or Harm())}, self._process.stdin)
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline())
        ended = Ended(answer["code"], answer["said"], answer["errors"])
        return Run(ended, answer["events"], answer["seconds"])

    def __enter__(self) -> "Children":
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(30)
        self._process.stdout.close()


def _serve() -> None:
    import lora_merge

    for module in pkgutil.walk_packages(lora_merge.__path__, "lora_merge."):
        if not module.name.endswith("__main__"):
            with contextlib.suppress(ImportError):
                import_module(module.name)
    for name in _LIBRARIES:
        with contextlib.suppress(ImportError):
            import_module(name)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
    for line in sys.stdin:
        asked = json.loads(line)
        harm = Harm(**asked["harm"])
        start = time.monotonic()
        pipes = [os.pipe() for _ in range(3)]  # stdout, stderr, events: no file, which may be full
        for _, writing in pipes:
            fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, _LONGEST_OUTPUT)
        child = os.fork()
        if child == 0:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
            _become(asked["words"], harm, pipes)
        for _, writing in pipes:
            os.close(writing)
        limit = harm.kill_after if harm.kill_after is not None else LONGEST
        if signal.sigtimedwait({signal.SIGCHLD}, limit) is None:
            os.kill(child, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        signal.sigtimedwait({signal.SIGCHLD}, 0)
        took = time.monotonic() - start
        said, errors, events = map(_all_of, pipes)
        answer = {"code": code, "said": said, "errors": errors, "seconds": took}
        print(json.dumps({**answer, "events": int(events or 0)}), flush=True)


def _all_of(pipe: tuple[int, int]) -> str:
    with open(pipe[0], encoding="utf-8", errors="replace") as file:  # noqa: PTH123
        return file.read()


def _become(words: list[str], harm: Harm, pipes: list[tuple[int, int]]) -> None:
    """Be the command, and end."""
    from lora_merge.cli.app import run

    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    for number, (reading, writing) in enumerate(pipes, start=1):
        os.close(reading)
        if number < 3:
            os.dup2(writing, number)
            os.close(writing)
    sys.stdout, sys.stderr = (open(n, "w", encoding="utf-8") for n in (1, 2))  # noqa: PTH123, SIM115
    if harm.largest_file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (harm.largest_file,) * 2)
    if harm.open_files is not None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (harm.open_files,) * 2)
    with _counting(harm.kill_at) as count:
        try:
            code = run(words)
        except BaseException:
            import traceback

            traceback.print_exc()
            code = 70
    os.write(pipes[2][1], f"{count[0]}".encode())
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(code)


@contextlib.contextmanager
def _counting(kill_at: int | None) -> Iterator[list[int]]:
    count, on = [0], [True]

    def hook(event: str, _: Any) -> None:
        if on[0] and event.startswith(_EVENTS):
            count[0] += 1
            if count[0] == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    yield count
    on[0] = False


if __name__ == "__main__":
    _serve()
