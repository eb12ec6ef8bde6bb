"""A safetensors header is believed where it fits the file; safetensors itself is the oracle."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from lora_merge.errors import SourceError
from lora_merge.files.header import read_header


def rewritten(path: Path, change: Any) -> Path:
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    target = path.with_name("changed.safetensors")
    target.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
    return target


@pytest.fixture
def file(tmp_path: Path) -> Path:
    tensors = {"a": torch.ones(2, 3), "b": torch.ones(4).bfloat16(), "e": torch.ones(0, 2)}
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    return tmp_path / "x.safetensors"


def test_what_safetensors_wrote_is_read(file: Path) -> None:
    header = read_header(file)
    assert {n: (e.dtype, e.shape) for n, e in header.entries.items()} == {
        "a": ("F32", (2, 3)), "b": ("BF16", (4,)), "e": ("F32", (0, 2)),
    }  # fmt: skip
    assert header.metadata == {"format": "pt"}


@pytest.mark.parametrize(
    "change",
    [
        lambda h: h["a"].update(data_offsets=h["b"]["data_offsets"]),
        lambda h: h["b"].update(data_offsets=[h["a"]["data_offsets"][0], 8]),
        lambda h: h["a"].update(dtype="F16"),
        lambda h: h["a"].update(shape=[3, 3]),
        lambda h: h["a"].update(shape=[2.0, 3]),
        lambda h: h["a"].update(shape=[-2, -3]),
        lambda h: h["a"].update(data_offsets=[24, 0]),
        lambda h: h["a"].update(data_offsets=[]),
        lambda h: h["a"].update(dtype="X8"),
        lambda h: h.pop("a"),
        lambda h: h.update(c=h["a"]),
        lambda h: h.update(c=None),
    ],
)
def test_what_does_not_fit_is_refused_as_safetensors_does(file: Path, change: Any) -> None:
    path = rewritten(file, change)
    with pytest.raises(SourceError):
        read_header(path)
    with pytest.raises(SafetensorError), safe_open(path, "pt"):
        pass


def test_the_length_is_no_reason_to_ask_for_memory(file: Path) -> None:
    data = file.read_bytes()
    for length in (0, 1, 2**32, 2**63, 2**64 - 1):
        file.write_bytes(struct.pack("<Q", length) + data[8:])
        with pytest.raises(SourceError, match="not a readable"):
            read_header(file)
