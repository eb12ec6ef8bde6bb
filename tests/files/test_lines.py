"""Lines come from files, pipes and devices, and none of these is read without an end."""

import hashlib
import os
import threading
from pathlib import Path

import pytest

from lora_merge.errors import SourceError
from lora_merge.files import lines
from lora_merge.files.lines import read_lines


@pytest.mark.parametrize("piece", [1, 3, 1 << 22])
def test_lines_are_what_stands_between_line_feeds(piece: int, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(lines, "_PIECE", piece)
    data = "a\u2028b\n\nü\r\nlast".encode()
    (tmp_path / "rows").write_bytes(data)
    found = read_lines(tmp_path / "rows", error=SourceError)
    assert found.texts == ("a\u2028b", "", "ü\r", "last")
    assert found.sha256 == hashlib.sha256(data).hexdigest()


def test_what_never_ends_is_refused(tmp_path: Path, monkeypatch) -> None:
    with pytest.raises(SourceError, match="/dev/zero has a line of more than"):
        read_lines(Path("/dev/zero"), error=SourceError)
    monkeypatch.setattr(lines, "_LARGEST", 1 << 20)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)

    def write() -> None:
        with pytest.raises(BrokenPipeError), pipe.open("wb", buffering=0) as file:
            while True:
                file.write(b'{"text": "a"}\n' * 1000)

    writer = threading.Thread(target=write)
    writer.start()
    with pytest.raises(SourceError, match="pipe does not end within"):
        read_lines(pipe, error=SourceError)
    writer.join()
    (tmp_path / "long").write_bytes(b"a\n" * (1 << 20))
    with pytest.raises(SourceError, match="2097152 bytes long"):
        read_lines(tmp_path / "long", error=SourceError)


@pytest.mark.parametrize("what", ["a directory", "nothing", "no UTF-8"])
def test_what_cannot_be_read_is_told(what: str, tmp_path: Path) -> None:
    path = tmp_path / "rows"
    if what == "a directory":
        path.mkdir()
    elif what == "no UTF-8":
        path.write_bytes(b"\xff\n")
    with pytest.raises(SourceError, match="cannot be read"):
        read_lines(path, error=SourceError)
