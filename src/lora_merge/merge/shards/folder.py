"""The directories of shards: `OUT.shards/3-of-16`, each stamped as ours, its manifest last."""

import contextlib
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from lora_merge.errors import OutputError
from lora_merge.files.atomic import lock_directory
from lora_merge.files.stamp import (
    begin_stamp,
    finish_stamp,
    foreign_entry,
    is_unfinished,
    remove_listed,
)
from lora_merge.merge.module_work import module_bytes
from lora_merge.merge.plan import MergePlan
from lora_merge.merge.shards.decided import Decision
from lora_merge.merge.shards.facts import Facts, difference
from lora_merge.merge.shards.plain_files import read_record, write_json

_PLAN, _MANIFEST = "plan.json", "shard.json"
_NAME = re.compile(r"(\d+)-of-(\d+)")


@dataclass(frozen=True)
class Shard:
    """Which part of a merge.

    Attributes:
        number: Counted from 1.
        count: Of how many.
    """

    number: int
    count: int

    @classmethod
    def parse(cls, text: str) -> "Shard":
        """From "3/16".

        Raises:
            OutputError: If it is no such thing.
        """
        match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text.strip())
        shard = cls(int(match[1]), int(match[2])) if match else cls(0, 0)
        if not 1 <= shard.number <= shard.count:
            raise OutputError(f"{text!r} is no shard", "write 3/16: the third of 16, from 1/16")
        return shard

    def of(self, plan: MergePlan) -> tuple[list[str], list[str]]:
        """Its modules, and its tensors that are not factors: about as much work in every shard."""
        costs = {(m.name, False): module_bytes(plan, m) for m in plan.alignment.modules}
        for name, owners in plan.extras.items():
            size = 1
            for length in owners[0].extras[name].shape:
                size *= length
            costs[name, True] = 4 * size * len(owners)
        loads = [0] * self.count
        mine: tuple[list[str], list[str]] = ([], [])
        for (name, extra), cost in sorted(costs.items(), key=lambda one: (-one[1], one[0])):
            lightest = loads.index(min(loads))
            loads[lightest] += cost
            if lightest == self.number - 1:
                mine[extra].append(name)
        return sorted(mine[0]), sorted(mine[1])

    def folder(self, out: Path) -> Path:
        """Where its results are."""
        return shards_of(out) / f"{self.number}-of-{self.count}"

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"


@dataclass(frozen=True)
class Header:
    """What a shard's run knew of its merge when it began.

    Attributes:
        facts: What decides the merge's bytes.
        recipe: The recipe, as YAML.
        decided: What depends on all modules.
        allow_pickle: Whether adapters may be pickles.
    """

    facts: Facts
    recipe: str
    decided: Decision
    allow_pickle: bool


@dataclass(frozen=True)
class Manifest:
    """What a shard has done.

    Attributes:
        shard: Its number, and of how many.
        plan: Digest of the facts.
        modules: Its modules.
        extras: Its tensors that are not factors.
        sha256: Of its share of the inputs, by adapter.
    """

    shard: tuple[int, int]
    plan: str
    modules: list[str]
    extras: list[str]
    sha256: dict[str, str]


def shards_of(out: Path) -> Path:
    """The directory of a result's shards."""
    return out.with_name(out.name + ".shards")


def found_shards(out: Path) -> list[Shard]:
    """The shards of which there is anything."""
    folder = shards_of(out)
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    matches = [match for name in names if (match := _NAME.fullmatch(name))]
    shards = [Shard(int(match[1]), int(match[2])) for match in matches]
    return sorted(shards, key=lambda shard: (shard.count, shard.number))


def is_complete(folder: Path) -> bool:
    """Whether a shard's manifest is there: it comes last."""
    return (folder / _MANIFEST).is_file() and not is_unfinished(folder)


@contextlib.contextmanager
def shard_folder(
    folder: Path, header: Header, *, force: bool = False, resume: bool = False
) -> Iterator[bool]:
    """A shard's directory, for one run alone, and its own plan in it.

    Args:
        folder: The directory.
        header: What this run knows of the merge.
        force: Throw away what is there, if it is ours.
        resume: Go on from what is there, if it is of the same facts.

    Yields:
        Whether it is complete already.

    Raises:
        OutputError: If there is something, and neither is asked for or possible, or another run
            is in it.
    """
    with contextlib.suppress(FileExistsError):
        folder.mkdir(parents=True)
    try:
        lock = lock_directory(folder)
    except BlockingIOError as error:
        raise OutputError(
            f"another run is writing {folder}", "wait until it has ended, or run another shard"
        ) from error
    try:
        if any(folder.iterdir()):
            _take_over(folder, header, force, resume)
        if not is_complete(folder):
            begin_stamp(folder)
            write_json(folder / _PLAN, asdict(header))
        yield is_complete(folder)
    finally:
        if lock is not None:
            os.close(lock)


def _take_over(folder: Path, header: Header, force: bool, resume: bool) -> None:
    """Make sure that what is in a directory may be gone on with, or is gone."""
    if not is_unfinished(folder):
        reason = foreign_entry(folder)
        if reason:
            raise OutputError(f"{folder} is not touched: {reason}", "move it away, or another -o")
    if force and not resume:
        for path in folder.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        return
    if not resume:
        raise OutputError(
            f"{folder} is there already", "--resume to go on with it, or --force to begin again"
        )
    again = "--force without --resume begins again"
    if not (folder / _PLAN).exists() and not any(folder.glob("*.part")):
        return  # killed before it had done anything
    found = difference(header.facts, read_record(Header, folder / _PLAN, again).facts)
    if found:
        raise OutputError(f"{folder} cannot be gone on with: {found}", again)


def finish_shard(folder: Path, manifest: Manifest) -> None:
    """Write the manifest, and then the stamp that lists everything."""
    write_json(folder / _MANIFEST, asdict(manifest))
    finish_stamp(folder)


def read_shard(folder: Path) -> tuple[Header, Manifest]:
    """The plan's header and the manifest of a shard that is complete and whole.

    Raises:
        OutputError: If it is not.
    """
    shard = folder.name.replace("-of-", "/")
    again = f"run --shard {shard} --resume"
    if not is_complete(folder):
        raise OutputError(f"shard {shard} is not done: {folder} has no manifest", again)
    reason = foreign_entry(folder)
    if reason:
        raise OutputError(f"shard {shard} is not as it was written: {reason}", f"--force: {again}")
    remedy = f"--force: {again}"
    header = read_record(Header, folder / _PLAN, remedy)
    return header, read_record(Manifest, folder / _MANIFEST, remedy)


def remove_shards(out: Path) -> None:
    """Delete what we wrote of a result's shards, and nothing else."""
    folder = shards_of(out)
    for shard in found_shards(out):
        remove_listed(shard.folder(out))
    with contextlib.suppress(OSError):
        for path in folder.glob("decided-*.json"):
            path.unlink()
        folder.rmdir()


def discard_shards(out: Path) -> None:
    """Delete what a run that failed left of its shards."""
    for shard in found_shards(out):
        folder = shard.folder(out)
        if is_unfinished(folder):
            shutil.rmtree(folder, ignore_errors=True)
    remove_shards(out)
