"""Directories and files that appear whole or not at all, and what they may replace."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from lora_merge.errors import OutputError
from lora_merge.files import atomic
from lora_merge.files.atomic import atomic_directory, atomic_file
from lora_merge.files.inputs import note_input, noting_inputs
from lora_merge.files.stamp import STAMP
from lora_merge.files.targets import check_file, check_target


def files(folder: Path) -> dict[str, bytes]:
    """Everything in a directory but the stamp."""
    found = (p for p in folder.rglob("*") if p.is_file() and p.name != STAMP)
    return {str(p.relative_to(folder)): p.read_bytes() for p in found}


def make(target: Path, text: str = "old", **options: bool) -> Path:
    """A directory of ours."""
    with atomic_directory(target, **options) as folder:
        (folder / "weights").write_text(text)
        (folder / "expert").mkdir()
        (folder / "expert" / "config").write_text(text)
    return target


OLD = {"weights": b"old", "expert/config": b"old"}


def current_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@pytest.mark.parametrize("there", [None, "empty", "ours"])
def test_a_directory_appears_whole(there: str | None, tmp_path: Path) -> None:
    target = tmp_path / "deep" / "out"
    if there == "empty":
        target.mkdir(parents=True)
    if there == "ours":
        make(target)
    with atomic_directory(target, force=there == "ours") as folder:
        (folder / "new").write_text("x")
    assert files(target) == {"new": b"x"}
    assert [p.name for p in target.parent.iterdir()] == ["out"]
    assert target.stat().st_mode & 0o777 == 0o777 & ~current_umask()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_an_error_leaves_what_was_there_and_no_parents(
    error: type[BaseException], tmp_path: Path
) -> None:
    target = make(tmp_path / "out")
    for place in (target, tmp_path / "new" / "deep" / "out"):
        with pytest.raises(error), atomic_directory(place, force=True) as folder:
            (folder / "half").write_text("x")
            raise error
    assert files(target) == OLD
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def put(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("precious")

    return change


FOREIGN: dict[str, Callable[[Path], None]] = {
    "a file": put("thesis.tex"),
    "a hidden file": put(".env"),
    "a file in a directory of ours": put("expert/notes"),
    "an edited file": put("weights"),
    "an edited file deeper": put("expert/config"),
    "a repository": put(".git/HEAD"),
    "a repository inside": put("expert/.git/HEAD"),
    "a file that git wrote": put("expert/.git"),
    "an empty directory": lambda folder: (folder / "plans").mkdir(),
    "a link": lambda folder: (folder / "link").symlink_to(folder.parent),
    "a broken link": lambda folder: (folder / "link").symlink_to("nowhere"),
    "no stamp": lambda folder: (folder / STAMP).unlink(),
    "an empty stamp": put(STAMP),
    "a stamp that lists what is outside": lambda folder: (folder / STAMP).write_text(
        '{"lora_merge": "1", "files": {"../precious": [1, "x"]}}'
    ),
    "a stamp of no depth": lambda folder: (folder / STAMP).write_text("[" * 100_000),
}


@pytest.mark.parametrize("what", FOREIGN)
def test_force_replaces_only_what_we_wrote(what: str, tmp_path: Path) -> None:
    target = make(tmp_path / "out")
    (tmp_path / "precious").write_text("x")
    FOREIGN[what](target)
    before = files(tmp_path)
    with pytest.raises(OutputError, match="is not replaced") as caught:
        make(target, "new", force=True)
    assert "move that directory away" in caught.value.remedy
    with pytest.raises(OutputError, match="not empty"):
        make(target, "new")
    assert files(tmp_path) == before
    target.rename(tmp_path / "away")  # the remedy
    make(target, "new", force=True)


@pytest.mark.parametrize("what", FOREIGN)
@pytest.mark.parametrize("moment", ["while it is written", "as it is exchanged"])
def test_what_appears_in_the_meantime_is_kept(
    what: str, moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = make(tmp_path / "out")
    before: dict[str, bytes] = {}

    def change() -> None:
        FOREIGN[what](target)
        before.update(files(target))

    if moment == "as it is exchanged":
        exchange = atomic._exchange

        def late(first: Path, second: Path) -> None:
            if not before:
                change()
            exchange(first, second)

        monkeypatch.setattr(atomic, "_exchange", late)
    with (
        pytest.raises(OutputError, match="is not replaced"),
        atomic_directory(target, force=True) as folder,
    ):
        (folder / "new").write_text("x")
        if moment == "while it is written":
            change()
    assert before and files(target) == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_without_force_nothing_that_appears_is_replaced(tmp_path: Path) -> None:
    ours = make(tmp_path / "ours")
    changes = (put("out/x"), lambda place: ours.rename(place / "out"), put("out"))
    for number, appear in enumerate(changes):
        place = tmp_path / str(number)
        with pytest.raises(OutputError), atomic_directory(place / "out") as folder:
            (folder / "new").write_text("x")
            appear(place)
        assert [p.name for p in place.iterdir()] == ["out"]
        assert not (place / "out" / "new").exists()


def test_a_system_that_cannot_exchange_renames(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(atomic.ctypes, "CDLL", lambda *_, **__: object())
    target = make(tmp_path / "out")
    make(target, "new", force=True)
    assert files(target)["weights"] == b"new"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_an_input_is_never_replaced_however_it_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = make(tmp_path / "out")
    (tmp_path / "link").symlink_to(target)
    (tmp_path / "up").symlink_to(tmp_path)
    (tmp_path / "hard").hardlink_to(target / "weights")
    monkeypatch.chdir(tmp_path)
    for named in (target, Path("out/weights"), Path("link/weights"), Path("up/out/expert/config")):
        for place in (target, Path("out"), Path("up/out"), tmp_path / "x" / ".." / "out"):
            if not place.exists():
                continue
            with pytest.raises(OutputError, match="holds an input"):
                check_target(place, force=True, inputs=[named])
            with noting_inputs(), pytest.raises(OutputError, match="holds an input"):
                note_input(named)
                make(place, "new", force=True)
    for inside in (Path("out/deep/new"), Path("up/out/new")):
        with pytest.raises(OutputError, match="lies inside an input"):
            check_target(inside, force=False, inputs=[Path("link")])
    check_target(Path("out"), force=True, inputs=[tmp_path / "hard", tmp_path / "nowhere"])
    assert files(target) == OLD


def test_the_working_directory_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = make(tmp_path / "out")
    (target / "below").mkdir()
    (tmp_path / "empty").mkdir()
    for here, named in ((target, "."), (target / "below", ".."), (tmp_path / "empty", "../empty")):
        monkeypatch.chdir(here)
        with pytest.raises(OutputError, match="working directory"):
            check_target(Path(named), force=True)


def test_names_lead_where_they_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for name, said in (
        ("missing/../../here", "working directory"),
        ("~", "home"),
        ("~x/y", "home"),
    ):
        with pytest.raises(OutputError, match=said), atomic_directory(Path(name), force=True):
            pass
        with pytest.raises(OutputError), atomic_file(Path(name)):
            pass
    assert list(tmp_path.rglob("*")) == [tmp_path / "here"]


def test_targets_are_refused_before_work(tmp_path: Path) -> None:
    foreign = tmp_path / "home"
    put("thesis.tex")(foreign)
    put("file")(tmp_path)
    (tmp_path / "link").symlink_to(foreign)
    for name, force, word in [
        ("home", False, "not empty"),
        ("file", True, "no directory"),
        ("file/below", True, "no directory"),
        ("link", True, "no directory"),
    ]:
        with pytest.raises(OutputError, match=word):
            check_target(tmp_path / name, force=force)
    with pytest.raises(OutputError, match="no space"):
        check_target(tmp_path / "new", force=False, needed=10**18)
    check_target(make(tmp_path / "old"), force=True, inputs=[foreign])
    check_target(tmp_path / "new" / "deep", force=False, inputs=[foreign], needed=10)


def test_a_second_run_into_one_target_says_so(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with atomic_directory(target) as first:
        (first / "weights").write_text("first")
        with pytest.raises(OutputError, match="another run is writing"):
            make(target)
        make(tmp_path / "beside")
    assert files(target) == {"weights": b"first"}
    make(target, "second", force=True)


def test_only_leftovers_of_ours_are_swept(tmp_path: Path) -> None:
    target = make(tmp_path / "out")
    program = (
        "import os, sys; from pathlib import Path\n"
        "from lora_merge.files.atomic import atomic_directory\n"
        f"with atomic_directory(Path({str(target)!r}), force=True) as folder:\n"
        "    (folder / 'half').write_text('x'); os.kill(os.getpid(), 9)\n"
    )
    assert subprocess.run([sys.executable, "-c", program]).returncode == -signal.SIGKILL
    assert files(target) == OLD
    (left,) = tmp_path.glob(".out.*.tmp")
    (tmp_path / ".out.bbbbbbbb.tmp").mkdir()  # killed before it could say whose it is
    put(f".out.cccccccc.tmp/{STAMP}.part")(tmp_path)
    put(".out.precious.tmp/thesis")(tmp_path)
    put(".out.abcd1234.tmp/thesis")(tmp_path)
    (tmp_path / ".out.aaaaaaaa.tmp").symlink_to(left)
    make(target, "new", force=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        ".out.aaaaaaaa.tmp", ".out.abcd1234.tmp", ".out.precious.tmp", "out",
    ]  # fmt: skip


def test_large_files_are_known_by_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lora_merge.files.stamp._WHOLE", 1000)
    monkeypatch.setattr("lora_merge.files.stamp._SAMPLE", 50)
    target = make(tmp_path / "out", "x" * 5000)
    check_target(target, force=True)
    for change in ("y" + "x" * 4999, "x" * 4999 + "y", "x" * 4999):
        (target / "weights").write_text(change)
        with pytest.raises(OutputError, match="weights was changed"):
            check_target(target, force=True)


def test_names_may_be_as_long_as_the_system_takes(tmp_path: Path) -> None:
    for name in ("é" * 127, "x" * 255):
        make(tmp_path / name)
        make(tmp_path / name, "new", force=True)
        with atomic_file(tmp_path / f"{name[:-4]}.csv") as path:
            path.write_text("x")
    assert len(list(tmp_path.iterdir())) == 4
    for check in (make, check_file, lambda place: check_target(place / "deep", force=True)):
        with pytest.raises(OutputError, match="too long") as caught:
            check(tmp_path / ("x" * 256))
        assert caught.value.remedy == "choose a shorter name"


def test_a_kill_leaves_no_part_of_a_file(tmp_path: Path) -> None:
    target = tmp_path / "numbers.csv"
    program = (
        "import os; from pathlib import Path; from lora_merge.files.atomic import atomic_file\n"
        f"with atomic_file(Path({str(target)!r})) as path:\n"
        "    path.write_text('half'); os.kill(os.getpid(), 9)\n"
    )
    assert subprocess.run([sys.executable, "-c", program]).returncode == -signal.SIGKILL
    assert not target.exists() and len(list(tmp_path.iterdir())) == 1
    with atomic_file(target) as path:
        path.write_text("whole")
        with pytest.raises(OutputError, match="another run is writing"), atomic_file(target):
            pass
    assert [p.name for p in tmp_path.iterdir()] == ["numbers.csv"]
    assert target.read_text() == "whole"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_file_appears_whole_or_not_at_all(error: type[BaseException], tmp_path: Path) -> None:
    target = tmp_path / "numbers.csv"
    with atomic_file(target) as path:
        path.write_text("old")
        assert not target.exists() and path.suffix == ".csv"
    assert target.stat().st_mode & 0o777 == 0o666 & ~current_umask()
    with pytest.raises(error), atomic_file(target) as path:
        path.write_text("half")
        raise error
    assert files(tmp_path) == {"numbers.csv": b"old"}
    link = tmp_path / "link.csv"
    link.symlink_to(target)
    with atomic_file(link) as path:
        path.write_text("new")
    assert link.is_symlink() and target.read_text() == "new"
    with atomic_file(Path("/dev/null")) as path:
        assert path == Path("/dev/null")
    with pytest.raises(OutputError, match="missing does not"), atomic_file(tmp_path / "missing/x"):
        pass


def test_a_file_is_no_input_and_nobody_elses(tmp_path: Path) -> None:
    put("weights")(tmp_path)
    (tmp_path / "hard").hardlink_to(tmp_path / "weights")
    (tmp_path / "link").symlink_to("weights")
    for name in ("weights", "hard", "link"):
        with noting_inputs(), pytest.raises(OutputError, match="is an input"):
            note_input(tmp_path / "weights")
            check_file(tmp_path / name)
        with pytest.raises(OutputError, match="did not write it"):
            check_file(tmp_path / name, b"our mark")
    for text in ("our mark\n1,2", "x" * 9000 + "our mark"):
        (tmp_path / "table").write_text(text)
        check_file(tmp_path / "table", b"our mark")
    with (
        pytest.raises(OutputError, match="did not write it"),
        atomic_file(tmp_path / "new", mark=b"our mark") as path,
    ):
        path.write_text("our mark")
        put("new")(tmp_path)
    assert (tmp_path / "new").read_text() == "precious"


def test_a_kill_loses_nothing(tmp_path: Path) -> None:
    target = make(tmp_path / "out")
    program = (
        "import sys, time; from pathlib import Path\n"
        "from lora_merge.files.atomic import atomic_directory\n"
        f"with atomic_directory(Path({str(target)!r}), force=True) as folder:\n"
        "    (folder / 'half').write_text('x'); print('ready', flush=True); time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    assert process.stdout is not None
    with process.stdout:
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(signal.SIGKILL)
        process.wait()
    time.sleep(0.05)
    assert files(target) == OLD
