"""What a command may lose when it is killed, or the disk is full: nothing."""

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from random import Random

from lora_merge.files.stamp import STAMP, finish_stamp
from robust.campaign import environment, made_in_a_process, words_of
from robust.children import Children, Harm, Run
from robust.commands import COMMANDS, Line
from robust.verdicts import contents, one_message

KILLED = -9
_PAGE = 4096
# The files of each output.
Outputs = list[dict[str, bytes]]
# What changes what is there (`arrive`, `pack --append`) has kills of its own in its tests.
WRITING = {n: line for n, line in COMMANDS.items() if line.writes and not line.changes}


@dataclass(frozen=True)
class Stage:
    """A corpus, a place to write in, and a process to run commands.

    Attributes:
        root: Of everything.
        places: The corpus.
        children: Runs commands.
    """

    root: Path
    places: dict[str, Path]
    children: Children

    @property
    def out(self) -> Path:
        """The output of every command."""
        return self.root / "here" / "deep" / "out"

    def words(self, line: Line) -> list[str]:
        """A command line that may replace what is there."""
        words = words_of(line, self.places, self.out)
        return [*words, "--force"] if str(self.out) in words else words

    def outputs(self, line: Line) -> list[Path]:
        """What a command makes."""
        return [Path(w) for w in self.words(line) if w.startswith(str(self.out))]

    def state(self, line: Line) -> Outputs:
        """Every output as it is now."""
        return [contents(path) for path in self.outputs(line)]

    def inputs(self) -> dict[str, bytes]:
        """The corpus, less its caches."""
        cache = self.places["cache"].name
        everything = contents(self.root / "corpus")
        return {n: data for n, data in everything.items() if not n.startswith(f"{cache}/")}

    def fresh(self, line: Line, old: Sequence[dict[str, bytes]], disk: int | None = None) -> None:
        """Put old outputs where the new ones will be, and nothing else; on a disk of that size."""
        here = self.out.parent
        if here.is_mount():
            subprocess.run(["umount", here], check=True)
        shutil.rmtree(here, ignore_errors=True)
        here.mkdir()
        if disk:
            options = ["-t", "tmpfs", "-o", f"size={disk}", "tmpfs"]
            subprocess.run(["mount", *options, here], check=True)
        if line.beside:
            shutil.copytree(self.places[line.beside[0]], f"{self.out}{line.beside[1]}")
        for path, files in zip(self.outputs(line), old, strict=True):
            for name, data in files.items():
                place = path / name if name else path
                place.parent.mkdir(parents=True, exist_ok=True)
                place.write_bytes(data)

    def left(self, line: Line) -> list[str]:
        """What is beside the outputs and should not be."""
        known = {path.name for path in self.outputs(line)} | set(line.work)
        beside = [p for p in self.out.parent.iterdir() if p.name not in known]
        elsewhere = [p for p in (self.root / "here").iterdir() if p != self.out.parent]
        return sorted(p.name for p in (*beside, *elsewhere))


@contextmanager
def stage(root: Path) -> Iterator[Stage]:
    """Make a corpus and start the process."""
    for name in ("home", "here", "plots"):
        (root / name).mkdir()
    places = made_in_a_process(root)
    with Children(root, environment(root)) as children:
        on = Stage(root, places, children)
        try:
            yield on
        finally:
            if on.out.parent.is_mount():
                subprocess.run(["umount", on.out.parent], check=True)


def rehearse(on: Stage, line: Line) -> tuple[Outputs, Outputs, Run]:
    """(old outputs, finished ones, the run that made them)."""
    on.fresh(line, [{} for _ in on.outputs(line)])
    done = on.children.run(on.words(line))
    if done.ended.code:
        raise AssertionError(f"{line.words}: {done.ended.errors}")
    finished = on.state(line)
    if any(STAMP in files for files in finished):
        shutil.rmtree(on.out)
        on.out.mkdir()
        (on.out / "old").write_text("old")
        finish_stamp(on.out)
        return [contents(on.out)], finished, done
    return [{"": files[""] + b"\n"} for files in finished], finished, done


def killed(on: Stage, name: str, random: Random, count: int) -> Iterator[tuple[str, list[str]]]:
    """Kill a command at random moments, run it again, and say what was lost.

    Half of the moments are drawn from what it asks of the system, half from the clock.
    """
    line = WRITING[name]
    old, finished, done = rehearse(on, line)
    inputs = on.inputs()
    for number in range(count):
        if number % 2:
            harm = Harm(kill_at=random.randint(1, done.events))
        else:
            harm = Harm(kill_after=random.uniform(0, done.seconds))
        on.fresh(line, old)
        run = on.children.run(on.words(line), harm)
        found = []
        if run.ended.code not in (KILLED, 0):
            found.append(f"ended with {run.ended.code}: {run.ended.errors[-300:]}")
        for before, after, now in zip(old, finished, on.state(line), strict=True):
            if now not in (before, after):
                found.append("neither the old output nor the new one")
        if on.inputs() != inputs:
            found.append("an input changed")
        again = [*on.words(line), *(["--resume"] if name == "train" else [])]
        second = on.children.run(again)
        if second.ended.code or on.state(line) != finished:
            found.append(f"run again: {second.ended.code} {second.ended.errors[-300:]}")
        found += [f"{left} was left after another run" for left in on.left(line)]
        ended = "killed" if run.ended.code == KILLED else "ended first"
        yield f"{name}: {harm}, {ended}", found


def short_of(
    on: Stage, name: str, harms: Callable[[Outputs, Outputs], Sequence[Harm]]
) -> Iterator[tuple[str, list[str]]]:
    """Run a command short of something: it ends as without, or with one error and nothing done."""
    line = WRITING[name]
    old, finished, _ = rehearse(on, line)
    inputs = on.inputs()
    for harm in harms(old, finished):
        on.fresh(line, old, harm.disk)
        run = on.children.run(on.words(line), harm)
        found = []
        if run.ended.code:
            found += one_message(run.ended, 1)
            if "\n  try: " not in run.ended.errors:
                found.append(f"no remedy: {run.ended.errors[-300:]}")
            for before, after, now in zip(old, finished, on.state(line), strict=True):
                if now not in ((before,) if len(old) == 1 else (before, after)):
                    found.append("the old output is gone")
        elif on.state(line) != finished:
            found.append("another result")
        if on.inputs() != inputs:
            found.append("an input changed")
        found += [f"{left} was left" for left in on.left(line)]
        said = run.ended.errors.strip().replace("\n", " ")
        yield f"{name}: {harm}: {run.ended.code} {said}", found


def by_file_size(_: Outputs, finished: Outputs) -> list[Harm]:
    """Limits that stop each file in turn."""
    sizes = {len(data) for files in finished for data in files.values()}
    return [Harm(largest_file=size) for size in sorted({0, *(s - 1 for s in sizes if s)})]


def by_open_files(_: Outputs, __: Outputs) -> list[Harm]:
    """Limits from next to nothing to enough."""
    return [Harm(open_files=limit) for limit in (4, 5, 6, 7, 8, 10, 16, 32)]


def by_disk(old: Outputs, finished: Outputs) -> list[Harm]:
    """File systems with room for the old output and some of the new one; it takes root to mount."""
    if os.geteuid():
        return []
    pages = [
        sum(-(-len(data) // _PAGE) + 2 for files in outputs for data in files.values())
        for outputs in (old, finished)
    ]
    return [Harm(disk=_PAGE * (pages[0] + 2 + pages[1] * part // 5)) for part in range(6)]


def report(root: Path, kills: int | None, seed: int, only: str | None, verbose: bool) -> int:
    """Kill, or let run short, and print what was lost; returns how many lost something."""
    random = Random(f"kills {seed}")
    names = [name for name in WRITING if only in (None, name)]
    random.shuffle(names)
    count, wrong = 0, 0
    with stage(root) as on:
        for index, name in enumerate(names):
            if kills is not None:
                share = kills // len(names) + (index < kills % len(names))
                results = killed(on, name, random, share)
            else:
                results = chain(
                    *(short_of(on, name, harms) for harms in (by_file_size, by_open_files, by_disk))
                )
            for what, found in results:
                count += 1
                wrong += bool(found)
                if found or verbose:
                    print(f"{what!a}", *found, sep="\n    ", flush=True)
    kind = "shortages" if kills is None else f"kills, seed {seed}"
    print(f"{count} {kind} of {len(names)} command lines: {wrong} with faults", flush=True)
    return wrong
