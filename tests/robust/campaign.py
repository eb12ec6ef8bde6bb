"""Damaged inputs for every command, many a second, with a watch on hangs and crashes."""

import contextlib
import io
import multiprocessing
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random

from robust.corpus import COMMANDS, build, files_of
from robust.mutations import damage
from robust.verdicts import faults

LONGEST = 20.0  # seconds of one command
STARTING = 120.0  # seconds until a process has loaded everything and done its first


@dataclass(frozen=True)
class Result:
    """One damaged input.

    Attributes:
        case: Its number.
        what: Command, file and damage.
        code: Exit code; None if it never ended.
        faults: What went wrong; empty if the end was clean.
    """

    case: int
    what: str
    code: int | None
    faults: tuple[str, ...]


def campaign(root: Path, cases: range, seed: int) -> Iterator[Result]:
    """Run cases in a process of their own, which is replaced when it hangs or dies."""
    places = build(root / "corpus")
    for name in ("home", "here"):
        (root / name).mkdir()
    context = multiprocessing.get_context("spawn")  # a fork of a process with threads may hang
    pristine = _snapshot(root)
    waiting = list(cases)
    while waiting:
        ours, theirs = context.Pipe()
        worker = context.Process(target=_work, args=(theirs, root, places, waiting, seed))
        worker.start()
        theirs.close()
        longest = STARTING
        while waiting:
            try:
                result = ours.recv() if ours.poll(longest) else None
            except EOFError:
                result = None
            if result is None:  # a hang, or a process that died
                alive = worker.is_alive()
                worker.kill()
                worker.join()
                end = f"a hang of {LONGEST:.0f} s" if alive else f"it died: {worker.exitcode}"
                case = waiting.pop(0)
                yield Result(case, draw(case, seed, root, places, pristine).what, None, (end,))
                break
            longest = LONGEST
            waiting.remove(result.case)
            yield result
        worker.join(LONGEST)
        worker.kill()


def _work(
    pipe: Connection, root: Path, places: dict[str, Path], cases: list[int], seed: int
) -> None:
    os.chdir(root / "here")
    os.environ |= {"HOME": str(root / "home"), "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
    os.environ.pop("LORA_MERGE_DEBUG", None)
    pristine = _snapshot(root)
    for case in cases:
        pipe.send(_one(case, seed, root, places, pristine))
    pipe.close()
    os._exit(0)


def _snapshot(root: Path) -> dict[Path, bytes]:
    """The corpus as it was made; kept beside it, for a worker after one that was killed."""
    kept = root / "pristine"
    if not kept.exists():
        import shutil

        shutil.copytree(root / "corpus", kept)
    found = {}
    for path in sorted(kept.rglob("*")):
        if path.is_file():
            original = root / "corpus" / path.relative_to(kept)
            original.write_bytes(path.read_bytes())
            found[original] = path.read_bytes()
    return found


def _one(
    case: int, seed: int, root: Path, places: dict[str, Path], pristine: dict[Path, bytes]
) -> Result:
    drawn = draw(case, seed, root, places, pristine)
    out = root / "here" / "deep" / "out"
    drawn.path.write_bytes(drawn.data)
    code, error, found = run_command(drawn.command, places, out)
    found += [] if code is None else faults(drawn.command, code, error, out, places)
    found += _changes(root, pristine, drawn.path, drawn.data)
    drawn.path.write_bytes(pristine[drawn.path])
    return Result(case, drawn.what, code, tuple(found))


@dataclass(frozen=True)
class Drawn:
    """A case before it runs.

    Attributes:
        command: Name of the command.
        path: The file that is damaged.
        data: What it holds then.
        what: All of it in words.
    """

    command: str
    path: Path
    data: bytes
    what: str


def draw(
    case: int, seed: int, root: Path, places: dict[str, Path], pristine: dict[Path, bytes]
) -> Drawn:
    """What a case is; the same for the same numbers."""
    random = Random(f"{seed} {case}")
    name = random.choice(sorted(COMMANDS))
    path = random.choice(files_of(places[random.choice(COMMANDS[name][0])]))
    data, said = damage(path, pristine[path], random)
    if random.random() < 0.2:
        data, more = damage(path, data, random)
        said = f"{said}, then {more}"
    return Drawn(name, path, data, f"{name}: {path.relative_to(root / 'corpus')}: {said}")


def run_command(name: str, places: dict[str, Path], out: Path) -> tuple[int | None, str, list[str]]:
    """Exit code, stderr, and what escaped."""
    from lora_merge.cli.app import run

    words = COMMANDS[name][1].split()
    arguments = [str(out) if word == "OUT" else word.format(**places) for word in words]
    errors = io.StringIO()
    with (
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(errors),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        try:
            return run(arguments), errors.getvalue(), []
        except BaseException as error:
            last = traceback.extract_tb(error.__traceback__)
            ours = [f for f in last if "lora_merge" in f.filename] or last
            where = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}"
            return None, "", [f"traceback: {type(error).__name__} at {where}: {str(error)[:150]!r}"]


def _changes(root: Path, pristine: dict[Path, bytes], damaged: Path, data: bytes) -> list[str]:
    """Inputs that are no longer what they were, and files where none belong."""
    import shutil

    found = []
    for path, before in pristine.items():
        if not path.is_file() or path.read_bytes() != (data if path == damaged else before):
            found.append(f"input {path.name} changed")
            path.write_bytes(before)
    strays = [p for p in (root / "corpus").rglob("*") if p.is_file() and p not in pristine]
    here = root / "here"
    strays += [p for p in here.iterdir() if p.name != "deep"]
    if (here / "deep").exists():
        strays += [p for p in (here / "deep").iterdir() if p.name != "out"]
        if not (here / "deep" / "out").exists():
            strays.append(here / "deep")
        shutil.rmtree(here / "deep")
    strays += [p for p in root.iterdir() if p.name not in ("corpus", "pristine", "home", "here")]
    for path in strays:
        found.append(f"left {path.relative_to(root)}")
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    return found


def main(cases: int, seed: int, first: int, root: Path) -> int:
    """Run a campaign and print what went wrong; returns the number of faults."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    start, wrong, ends = time.monotonic(), 0, {0: 0, 1: 0, 2: 0, None: 0}
    for result in campaign(root, range(first, first + cases), seed):
        ends[result.code] = ends.get(result.code, 0) + 1
        for fault in result.faults:
            wrong += 1
            print(f"{result.case}: {result.what!a}\n    {fault}", flush=True)
    took = time.monotonic() - start
    print(f"{cases} cases, seed {seed}: {wrong} faults; exit codes {ends}; {took:.0f} s")
    sys.stdout.flush()
    return wrong
