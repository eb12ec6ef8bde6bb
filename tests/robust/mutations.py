"""Damage to files, drawn from a seed: what a mistake, a broken disk or a hostile author leaves."""

# ruff: noqa: E501 - tables of hostile values
import contextlib
import io
import json
import pickle
import sqlite3
import struct
from collections.abc import Callable
from datetime import date
from pathlib import Path
from random import Random
from typing import Any

import torch
import yaml

_DEEP: Any = []
for _ in range(3000):
    _DEEP = [_DEEP]

# What may stand in the place of any value; a function of the old one where it must be close to it.
VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 7, 10**9, 2**63, 10**400, -(10**30), 0.5, -0.0, 1e300, 1e-300, 1e39,
    float("inf"), float("-inf"), float("nan"), "", " ", "0", "nan", "\ud800", "a\0b", "\x1b[31m", "../x",
    "/etc/passwd", "~nobody", "~", "é" * 200, "x" * 100_000, "(a+)+$", "(.*)*(.*)*x", "[", "(?P<a>", "*",
    "---\nkey: value", "<script>", "| a | b |", [], {}, [None], [[]], [1, "a", None], {"": None},
    {"a": {"b": []}}, {"(.*)*(.*)*x": 4}, {"((\\w+\\.?)+)+!": 4}, {"(a|a)*b": 2}, ["../x"], _DEEP, [None] * 1000, "energy:2", "budget:x0", "F4", "I64",
)  # fmt: skip
_BYTES = (b"\0", b"\xff", b"{", b"\x80\x81", b"\n" * 50, b"9" * 20, b"[" * 2000)


def damage(path: Path, data: bytes, random: Random) -> tuple[bytes, str]:
    """A file's bytes with something wrong in them, and what was done."""
    structured = _BY_KIND.get(path.suffix, _damage_text)
    if random.random() < 0.8:
        try:
            return structured(path, data, random)
        except (
            ValueError,
            TypeError,
            LookupError,
            AttributeError,
            RuntimeError,
            yaml.YAMLError,
            struct.error,
            OverflowError,
            sqlite3.Error,
            pickle.PickleError,
        ):
            pass  # damaged before, so that it has no structure any more
    return _damage_bytes(data, random)


def _damage_bytes(data: bytes, random: Random) -> tuple[bytes, str]:
    place = (
        random.randrange(len(data) + 1)
        if random.random() < 0.5
        else random.randrange(min(200, len(data) + 1))
    )
    kind = random.choice(("cut", "insert", "flip", "drop", "empty", "double", "lfs"))
    junk = random.choice(_BYTES)
    changed = {
        "cut": data[:place],
        "insert": data[:place] + junk + data[place:],
        "flip": data[:place]
        + bytes(b ^ 1 << random.randrange(8) for b in data[place : place + 1])
        + data[place + 1 :],
        "drop": data[:place] + data[place + random.randrange(1, 9) :],
        "empty": b"",
        "double": data + data,
        "lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
    }[kind]
    return changed, f"{kind} at {place}"


def _damage_text(path: Path, data: bytes, random: Random) -> tuple[bytes, str]:
    text = data.decode()
    if path.suffix == ".json":
        tree, said = _damage_tree(json.loads(text), random)
        return json.dumps(tree).encode("utf-8", "surrogatepass"), said
    if path.suffix == ".yaml":
        return _damage_yaml(text, random)
    raise ValueError("no structure")


def _damage_yaml(text: str, random: Random) -> tuple[bytes, str]:
    extra = random.choice((
        "", "", "", "scale: 2020-01-01\n", "seed: !!int '9'\n", "seed: 0x" + "f" * 5000 + "\n",
        "seed: 1_0:59\n", "parameters: &a [*a]\n", "parameters: !!set {a, b}\n", "scale: !!binary aGk=\n",
        "rank: " + "[" * 3000 + "\n", "dtype: !!python/object:os.system x\n", "a: &a [x,x,x,x,x,x,x,x]\nb: &b "
        "[*a,*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b,*b,*b]\nd: &d [*c,*c,*c,*c,*c,*c,*c,*c]\n"
        "e: &e [*d,*d,*d,*d,*d,*d,*d,*d]\nparameters: {a: [*e,*e,*e,*e,*e,*e,*e,*e]}\n",
        "? [a]\n: b\n", "<<: {scale: 3}\n", "scale: .nan\n", "scale: -.inf\n", "1: 2\n", "~: 1\n",
    ))  # fmt: skip
    if extra:
        return (text + extra).encode(), f"added {extra[:40]!r}"
    tree, said = _damage_tree(yaml.safe_load(text), random)
    if random.random() < 0.1:
        tree["statistics"] = date(2020, 1, 1)
    return json.dumps(tree, default=str).encode("utf-8", "surrogatepass"), said  # JSON is YAML


def _places(tree: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) of a document."""
    found, waiting = [], [tree]
    while waiting:
        one = waiting.pop()
        keys = one if isinstance(one, dict) else range(len(one)) if isinstance(one, list) else ()
        for key in keys:
            found.append((one, key))
            waiting.append(one[key])
    return found


def _damage_tree(tree: Any, random: Random) -> tuple[Any, str]:
    places = _places(tree)
    if not places or random.random() < 0.05:
        value = random.choice(VALUES)
        return value, f"the whole is {value!r:.40}"
    inside, key = random.choice(places)
    kind = random.choice(("replace", "replace", "replace", "drop", "rename", "add", "wrap"))
    value = random.choice(VALUES)
    if kind == "drop":
        del inside[key]
    elif kind == "rename" and isinstance(inside, dict):
        inside[random.choice([v for v in VALUES if isinstance(v, str)])] = inside.pop(key)
    elif kind == "add" and isinstance(inside, dict):
        name = random.choice(
            ("use_dora", "layer_replication", "lora_bias", "revision", "alpha_pattern", "unknown")
        )
        inside[name] = value
    elif kind == "wrap":
        inside[key] = random.choice(([inside[key]], {"a": inside[key]}, str(inside[key])))
    else:
        inside[key] = value
    return tree, f"{kind} {key!r:.60} {value!r:.40}"


def _damage_tensors(path: Path, data: bytes, random: Random) -> tuple[bytes, str]:
    (length,) = struct.unpack("<Q", data[:8])
    head, body = data[8 : 8 + length], bytearray(data[8 + length :])
    kind = random.choice(("header", "header", "header", "values", "values", "length", "offsets"))
    header = json.loads(head)
    names = [name for name in header if name != "__metadata__"]
    said = kind
    if kind == "header":
        header, said = _damage_tree(header, random)
    elif kind == "offsets" and len(names) > 1:
        first, second = random.sample(names, 2)
        other = header[second]["data_offsets"]
        header[first]["data_offsets"] = list(other)
        said = f"{first} lies where {second} does"
    elif kind == "values":
        said = _damage_values(header, names, body, random)
    elif kind == "length":
        length = random.choice((0, 1, length - 1, length + 1, 2**32, 2**63, 2**64 - 1))
        return struct.pack("<Q", length) + head + bytes(body), f"length {length}"
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + bytes(body), said


def _damage_checkpoint(path: Path, data: bytes, random: Random) -> tuple[bytes, str]:
    state = torch.load(io.BytesIO(data), weights_only=True)
    if random.random() < 0.3:
        tensor = random.choice(state["tensors"])
        tensor.view(-1)[0] = random.choice((float("nan"), float("inf"), 1e38))
        said = "a tensor"
    else:
        state, said = _damage_tree(state, random)
    made = io.BytesIO()
    torch.save(state, made)
    return made.getvalue(), said


def _damage_database(path: Path, data: bytes, random: Random) -> tuple[bytes, str]:
    """Another value in a cell, or a table that is gone."""
    with contextlib.closing(sqlite3.connect(":memory:")) as base:
        base.deserialize(data)
        names = [
            row[0] for row in base.execute("SELECT name FROM sqlite_master WHERE type='table'")
        ]
        filled = [n for n in names if base.execute(f"SELECT count(*) FROM {n}").fetchone()[0]]
        table = random.choice(filled)
        if random.random() < 0.1:
            base.execute(f"DROP TABLE {table}")
            base.commit()
            return base.serialize(), f"no {table}"
        columns = [row[1] for row in base.execute(f"PRAGMA table_info({table})")]
        column = random.choice(columns)
        value = random.choice([v for v in VALUES if isinstance(v, str | float | int | None)])
        base.execute(f"UPDATE {table} SET {column} = ?", (value,))
        base.commit()
        return base.serialize(), f"{table}.{column} {value!r:.40}"


_FLOATS: dict[str, Callable[[float], bytes]] = {
    "F32": lambda value: struct.pack("<f", value),
    "F64": lambda value: struct.pack("<d", value),
    "BF16": lambda value: struct.pack("<f", value)[2:],
}


def _damage_values(header: Any, names: list[str], body: bytearray, random: Random) -> str:
    name = random.choice(names)
    entry = header[name]
    pack = _FLOATS.get(entry["dtype"])
    if pack is None:
        raise ValueError("no floats")
    start, end = entry["data_offsets"]
    value = random.choice(
        (float("nan"), float("inf"), -float("inf"), 3e38, -3e38, 1e30, 1e-40, 0.0)
    )
    size = len(pack(0.0))
    everywhere = random.random() < 0.5
    for place in range(start, end, size) if everywhere else [start]:
        body[place : place + size] = pack(value)
    return f"{name} is {value} {'everywhere' if everywhere else 'once'}"


_BY_KIND = {
    ".safetensors": _damage_tensors,
    ".part": _damage_tensors,
    ".pt": _damage_checkpoint,
    ".db": _damage_database,
}
