"""Damaged inputs for every command, many a second, with a watch on hangs and crashes."""

import contextlib
import io
import json
import multiprocessing
import os
import resource
import shutil
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random

from robust.commands import COMMANDS, Line
from robust.corpus import MADE, build, files_of
from robust.mutations import damage
from robust.verdicts import Ended, faults

LONGEST = 20.0  # seconds of processor time of one command
PATIENCE = 10  # times as much on the clock, for a machine that has other things to do
STARTING = 240.0  # seconds until a process has loaded everything and made the corpus
MEMORY = 12 << 30  # bytes of address space: nothing here needs a gigabyte


@dataclass(frozen=True)
class Result:
    """One damaged input.

    Attributes:
        case: Its number; below 0 for the undamaged corpus, a command each.
        what: Command, file and damage.
        code: Exit code; None if it never ended.
        faults: What went wrong; empty if the end was clean.
    """

    case: int
    what: str
    code: int | None
    faults: tuple[str, ...]


def undamaged() -> list[int]:
    """Numbers of the cases that run each command on the corpus as it is."""
    return [-1 - index for index in range(len(COMMANDS))]


def campaign(root: Path, cases: Iterable[int], seed: int) -> Iterator[Result]:
    """Run cases in a process of their own, which is replaced when it hangs or dies."""
    for name in ("home", "here", "plots"):
        (root / name).mkdir(exist_ok=True)
    context = multiprocessing.get_context("spawn")  # a fork of a process with threads may hang
    waiting = list(cases)
    while waiting:
        ours, theirs = context.Pipe()
        with _environment(root):
            worker = context.Process(target=_work, args=(theirs, root, waiting, seed))
            worker.start()
        theirs.close()
        longest, what = STARTING, ""
        while waiting:
            said = _answer(ours, worker.pid or 0, longest)
            if isinstance(said, str):
                longest, what = LONGEST, said
            elif isinstance(said, Result):
                waiting.remove(said.case)
                yield said
            elif not what:
                worker.kill()
                raise RuntimeError("the campaign's worker cannot make the corpus")
            else:  # a hang, or a process that died
                alive = worker.is_alive()
                worker.kill()
                worker.join()
                end = f"a hang of {longest:.0f} s" if alive else f"it died: {worker.exitcode}"
                yield Result(waiting.pop(0), what, None, (end,))
                break
        worker.join(1)
        worker.kill()


def _answer(pipe: Connection, worker: int, longest: float) -> object:
    """What a worker says; None if it has died, or computed for too long without a word."""
    before, end = _computed(worker), time.monotonic() + PATIENCE * longest
    while not pipe.poll(1.0):
        if _computed(worker) - before > longest or time.monotonic() > end:
            return None
    try:
        return pipe.recv()
    except EOFError:
        return None


def _computed(worker: int) -> float:
    """Seconds of processor time that a process has had."""
    try:
        fields = Path(f"/proc/{worker}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def _environment(root: Path) -> Iterator[None]:
    """What a worker inherits."""
    before = dict(os.environ)
    os.environ |= environment(root)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ |= before


def environment(root: Path) -> dict[str, str]:
    """Variables for every command: caches in the corpus, no network, nothing of the user's."""
    cache = root / "corpus" / "cache"
    return {
        "HOME": str(root / "home"), "MPLCONFIGDIR": str(root / "plots"),
        "XDG_CACHE_HOME": str(cache),
        "HF_HOME": str(cache / "hub"), "HF_ASSETS_CACHE": str(cache / "hub" / "assets"),
        "HF_HUB_OFFLINE": "1", "COLUMNS": "200", "LORA_MERGE_DEBUG": "",
    }  # fmt: skip


def made_in_a_process(root: Path) -> dict[str, Path]:
    """Make the corpus in a process that ends; returns its places."""
    list(campaign(root, [-1], 0))
    return places_in(root)


def places_in(root: Path) -> dict[str, Path]:
    """The places of a corpus that was made."""
    texts = json.loads((root / "places.json").read_text())
    return {name: Path(place) for name, place in texts.items()}


def _work(pipe: Connection, root: Path, cases: list[int], seed: int) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    os.chdir(root / "here")
    warnings.simplefilter("ignore")
    with contextlib.redirect_stderr(io.StringIO()):
        corpus = Corpus.make(root)
        for case in cases:
            line, drawn = corpus.draw(case, seed)
            pipe.send(drawn.what)
            pipe.send(corpus.run(case, line, drawn))
    pipe.close()
    os._exit(0)


@dataclass(frozen=True)
class Drawn:
    """A case before it runs: what it is in words, and the file that is damaged, if any."""

    name: str
    what: str
    path: Path | None = None
    data: bytes = b""


@dataclass(frozen=True)
class Corpus:
    """The corpus on disk, and how it was when it was made.

    Attributes:
        root: Where it is, and everything that commands may write.
        places: Its places by name.
        pristine: Content of its files.
    """

    root: Path
    places: dict[str, Path]
    pristine: dict[Path, bytes]

    @classmethod
    def make(cls, root: Path) -> "Corpus":
        """Make it, or take it back from a worker that was killed."""
        kept = root / "pristine"
        here = root / "corpus"
        if not kept.exists():
            places = build(here)
            for name in ("evaluate", "spectra beside a base"):  # they fill the caches
                run_command(COMMANDS[name], places, root / "here" / "deep" / "out")
            texts = {name: str(place) for name, place in places.items()}
            (root / "places.json").write_text(json.dumps(texts))
            shutil.copytree(here, kept)
        places = places_in(root)
        files = [path for path in sorted(kept.rglob("*")) if path.is_file()]
        corpus = cls(root, places, {here / p.relative_to(kept): p.read_bytes() for p in files})
        for path, data in corpus.pristine.items():
            _put(path, data)
        return corpus

    def draw(self, case: int, seed: int) -> tuple[Line, Drawn]:
        """What a case is; the same for the same numbers."""
        if case < 0:
            name = list(COMMANDS)[-1 - case]
            return COMMANDS[name], Drawn(name, f"{name}: undamaged")
        random = Random(f"{seed} {case}")
        name = random.choice(sorted(COMMANDS))
        line = COMMANDS[name]
        path = random.choice(files_of(self.places[random.choice(line.damaged)]))
        data, said = damage(path, self.pristine[path], random)
        if random.random() < 0.2:
            data, more = damage(path, data, random)
            said = f"{said}, then {more}"
        what = f"{name}: {path.relative_to(self.root / 'corpus')}: {said}"
        return line, Drawn(name, what, path, data)

    def run(self, case: int, line: Line, drawn: Drawn) -> Result:
        """Run a case, look at everything, and put the corpus back."""
        out = self.root / "here" / "deep" / "out"
        if drawn.path is not None:
            drawn.path.write_bytes(drawn.data)  # not of the age that caches know
        if line.makes_files or line.beside:  # a file's directory has to be there
            out.parent.mkdir()
        if line.beside:
            shutil.copytree(self.places[line.beside[0]], f"{out}{line.beside[1]}")
        ended, found = run_command(line, self.places, out)
        if ended is not None:
            found += faults(drawn.name, line, ended, out, self.places)
            if case < 0 and ended.code:
                found.append(f"refused: {ended.errors!r:.300}")
        found += self._changes(drawn, line, failed=ended is None or ended.code != 0)
        if drawn.path is not None:
            _put(drawn.path, self.pristine[drawn.path])
        return Result(case, drawn.what, None if ended is None else ended.code, tuple(found))

    def _changes(self, drawn: Drawn, line: Line, *, failed: bool) -> list[str]:
        """Inputs that are no longer what they were, and files where none belong."""
        found = []
        cache = self.places["cache"]
        for path, before in self.pristine.items():
            now = drawn.data if path == drawn.path else before
            if not path.is_file() or path.read_bytes() != now:
                if not path.is_relative_to(cache):
                    found.append(f"input {path.name} changed")
                _put(path, before)
        inside = (p for p in (self.root / "corpus").rglob("*") if p.is_file())
        strays = [p for p in inside if p not in self.pristine]
        for path in [p for p in strays if p.is_relative_to(cache)]:
            strays.remove(path)
            path.unlink()
        here = self.root / "here"
        strays += [p for p in here.iterdir() if p.name != "deep"]
        if (here / "deep").exists():
            beside = [p for p in (here / "deep").iterdir() if p.name not in line.work]
            allowed = {w[3:] for w in line.words.split() if w.startswith("OUT")}
            if line.beside:
                allowed.add(line.beside[1])
                beside = [p for p in beside if p.name != f"out{line.beside[1]}"]
            strays += [p for p in beside if failed or p.name.removeprefix("out") not in allowed]
            if not any((here / "deep").iterdir()) and not line.makes_files:
                found.append("an empty directory was left")
            kept = dict.fromkeys(strays)
            strays = list(kept)
        known = ("corpus", "pristine", "places.json", "plots", "home", "here")
        strays += [p for p in self.root.iterdir() if p.name not in known]
        strays += list((self.root / "home").iterdir())
        for path in strays:
            found.append(f"left {path.relative_to(self.root)}")
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        shutil.rmtree(here / "deep", ignore_errors=True)
        return found


def _put(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    os.utime(path, (MADE, MADE))


def words_of(line: Line, places: dict[str, Path], out: Path) -> list[str]:
    """A command line with the corpus' places and an output in it."""
    words = (word.format(**places) for word in line.words.split())
    return [f"{out}{word[3:]}" if word.startswith("OUT") else word for word in words]


def run_command(line: Line, places: dict[str, Path], out: Path) -> tuple[Ended | None, list[str]]:
    """How a command ended, and what escaped."""
    from lora_merge.cli.app import run

    said, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(errors):
        try:
            code = run(words_of(line, places, out))
        except BaseException as error:
            last = traceback.extract_tb(error.__traceback__)
            ours = [f for f in last if "lora_merge" in f.filename] or last
            where = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}"
            return None, [f"traceback: {type(error).__name__} at {where}: {str(error)[:150]!r}"]
    return Ended(code, said.getvalue(), errors.getvalue()), []


def main(cases: int, seed: int, first: int, root: Path, log: Path | None = None) -> int:
    """Run a campaign and print what went wrong; returns the number of faults.

    Args:
        cases: How many, beside the undamaged ones.
        seed: Of the damage.
        first: Number of the first.
        root: An empty directory.
        log: File to write every result into; cases that are there are not run again.
    """
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    done = _read_log(log, seed)
    wanted = [*undamaged(), *range(first, first + cases)]
    results = list(done.values())
    start = time.monotonic()
    for result in campaign(root, [case for case in wanted if case not in done], seed):
        results.append(result)
        if log is not None:
            with log.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"seed": seed, **asdict(result)}) + "\n")
        for fault in result.faults:
            print(f"{result.case}: {result.what!a}\n    {fault}", flush=True)
    damaged = [r for r in results if r.case >= 0]
    ends = {code: sum(r.code == code for r in damaged) for code in (0, 1, 2, None)}
    wrong = sum(bool(r.faults) for r in results)
    took = time.monotonic() - start
    print(
        f"{len(damaged)} damaged inputs of {len(COMMANDS)} command lines, seed {seed}: "
        f"{wrong} with faults; exit codes {ends}; {took:.0f} s"
    )
    sys.stdout.flush()
    return wrong


def _read_log(log: Path | None, seed: int) -> dict[int, Result]:
    if log is None or not log.exists():
        return {}
    rows = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    return {
        row["case"]: Result(row["case"], row["what"], row["code"], tuple(row["faults"]))
        for row in rows
        if row["seed"] == seed
    }
