"""What has to be true after a command ran on a damaged input, whatever it made of it."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file

from robust.commands import Line

_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
_TRACE = re.compile(r"Traceback|File \"")


@dataclass(frozen=True)
class Ended:
    """How a command ended.

    Attributes:
        code: Exit code.
        said: What it wrote to stdout.
        errors: What it wrote to stderr.
    """

    code: int
    said: str
    errors: str


def faults(name: str, line: Line, ended: Ended, out: Path, places: dict[str, Path]) -> list[str]:
    """Everything that is wrong with one command's end; nothing if all is well.

    Args:
        name: Of the command.
        line: It.
        ended: How it ended.
        out: Where its output would be.
        places: The corpus.
    """
    found = [] if ended.code in (0, 1, 2) else [f"exit code {ended.code}"]
    made = [Path(f"{out}{w[3:]}") for w in line.words.split() if w.startswith("OUT")]
    found += one_message(ended, int(ended.code != 0))
    if ended.code:
        kept = line.beside and not line.beside[1]  # an output that was there
        if not kept and any(path.exists() for path in made):
            found.append("an output was left after an error")
        if kept and contents(out) != contents(places[line.beside[0]]):
            found.append("an output that was there has changed")
        return found
    found += [f"there is no {path.name}" for path in made if not path.exists()]
    try:
        if "--json" in line.words.split():
            json.loads(ended.said, parse_constant=_no_constant)
        if out.is_dir():
            found += _output_faults(name, out, places)
        texts = [p for p in made if p.is_file() and p.suffix != ".png"]
        found += [
            f"control characters in {path.name}"
            for path in texts
            if _CONTROL.search(path.read_text(encoding="utf-8"))
        ]
    except Exception as error:  # whatever a reader says of an output that it cannot read
        found.append(f"unreadable output: {type(error).__name__}: {str(error)[:150]}")
    return found


def contents(path: Path) -> dict[str, bytes]:
    """Every file below a directory, or a file as the only one without a name."""
    if path.is_file():
        return {"": path.read_bytes()}
    return {p.relative_to(path).as_posix(): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def one_message(ended: Ended, count: int) -> list[str]:
    """What is wrong with what a command said, if it should have said `count` errors."""
    found = []
    if _TRACE.search(ended.errors):
        found.append(f"a traceback was shown: {ended.errors[-300:]!r}")
    if _CONTROL.search(ended.errors + ended.said):
        found.append("control characters reached the terminal")
    messages = re.findall(r"^(?:error|Error): ", ended.errors, re.MULTILINE)
    if len(messages) != count:
        found.append(f"{len(messages)} messages: {ended.errors[-200:]!r}")
    if count and ended.said:
        found.append(f"an error after output: {ended.said[:100]!r}")
    return found


def _output_faults(name: str, out: Path, places: dict[str, Path]) -> list[str]:
    found = []
    for path in sorted(out.rglob("*.safetensors")):
        for tensor, value in load_file(path).items():
            if tensor.endswith("norm.weight"):
                continue  # no adapter changes it: fuse copies its bytes
            if value.is_floating_point() and not bool(torch.isfinite(value.double()).all()):
                found.append(f"{path.name}: {tensor} is not finite")
    for path in sorted(out.rglob("*.json")):
        if path.name != "config.json":  # a base's own, which may hold Infinity
            json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_constant)
    for path in sorted(out.rglob("README.md")):
        _, head, _ = path.read_text(encoding="utf-8").split("---\n", 2)
        data = yaml.safe_load(head)
        known = {
            "base_model", "base_model_relation", "library_name", "tags", "license", "pipeline_tag"
        }  # fmt: skip
        if not isinstance(data, dict) or not data.keys() <= known:
            found.append(f"the card says {data!r:.200}")
    if name == "cat":
        found += _same(_deltas(out), _weighted((places["a"], 0.5), (places["b"], -2.0)))
    if name == "convert":
        found += _same(_deltas(out), _weighted((places["a"], 1.0)))
    if name == "fuse":
        found += _fused_faults(out, places)
    return found


def _no_constant(text: str) -> None:
    raise ValueError(f"{text} in JSON")


def _weighted(*adapters: tuple[Path, float]) -> dict[str, torch.Tensor]:
    """A sum of deltas from the files alone: PEFT's formula in float64."""
    total: dict[str, Any] = {}
    for place, weight in adapters:
        for module, delta in _deltas(place).items():
            total[module] = total.get(module, 0) + weight * delta
    return total


def _same(made: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> list[str]:
    if made.keys() != wanted.keys():
        return [f"modules {sorted(made.keys() ^ wanted.keys())}"]
    size = max(float(value.abs().max()) for value in wanted.values())
    return [
        f"{module} is not what the formula says"
        for module, value in wanted.items()
        if float((made[module] - value).abs().max()) > 1e-4 * max(size, 1e-30)
    ]


def _fused_faults(out: Path, places: dict[str, Path]) -> list[str]:
    """Base plus delta, from the files alone; no tensor gone, none new."""
    before, after = (dict(_shards(place)) for place in (places["base"], out))
    wanted = {name: value.double() for name, value in before.items()}
    for module, delta in _deltas(places["a"]).items():
        wanted[f"{module}.weight"] = wanted[f"{module}.weight"] + delta
    return _same({name: value.double() for name, value in after.items()}, wanted)


def _shards(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    for path in sorted(folder.glob("*.safetensors")):
        yield from load_file(path).items()


def _deltas(folder: Path) -> dict[str, torch.Tensor]:
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    found = {}
    for name in tensors:
        if not name.endswith(".lora_A.weight"):
            continue
        module = name.removesuffix(".lora_A.weight")
        bare = module.removeprefix("base_model.model.")
        a, b = tensors[name].double(), tensors[f"{module}.lora_B.weight"].double()
        alpha = float(_matching(config.get("alpha_pattern"), bare, config.get("lora_alpha", 8)))
        root = 0.5 if config.get("use_rslora") else 1.0
        found[bare] = alpha / len(a) ** root * b @ a
    return found


def _matching(patterns: Any, module: str, default: Any) -> Any:
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default
