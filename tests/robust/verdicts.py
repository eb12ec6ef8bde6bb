"""What has to be true after a command ran on a damaged input, whatever it made of it."""

import json
import re
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file

_TRACE = re.compile(r"Traceback|File \"")


def faults(name: str, code: int, said: str, out: Path, places: dict[str, Path]) -> list[str]:
    """Everything that is wrong with one command's end; nothing if all is well.

    Args:
        name: Of the command.
        code: Its exit code.
        said: What it wrote to stderr.
        out: Where its output would be.
        places: The corpus.
    """
    found = []
    if code not in (0, 1, 2):
        found.append(f"exit code {code}")
    if _TRACE.search(said):
        found.append("a traceback was shown")
    if re.search(r"[\x00-\x08\x0b-\x1f\x7f]", said):
        found.append("control characters reached the terminal")
    if code:
        messages = re.findall(r"^(?:error|Error): ", said, re.MULTILINE)
        if len(messages) != 1:
            found.append(f"{len(messages)} messages: {said[-200:]!r}")
        if out.exists():
            found.append("an output was left after an error")
        return found
    if not out.exists():
        return found
    try:
        return found + _output_faults(name, out, places)
    except Exception as error:  # whatever a reader says of an output that it cannot read
        return [*found, f"unreadable output: {type(error).__name__}: {str(error)[:150]}"]


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
        found += _sum_faults(out, places)
    return found


def _no_constant(text: str) -> None:
    raise ValueError(f"{text} in JSON")


def _sum_faults(out: Path, places: dict[str, Path]) -> list[str]:
    """The exact sum, from the files alone: PEFT's formula in float64."""
    total: dict[str, Any] = {}
    size = 0.0
    for place, weight in ((places["a"], 0.5), (places["b"], -2.0)):
        for module, delta in _deltas(place).items():
            total[module] = total.get(module, 0) + weight * delta
            size = max(size, float(delta.abs().max()))
    made = _deltas(out)
    if made.keys() != total.keys():
        return [f"modules {sorted(made.keys() ^ total.keys())}"]
    return [
        f"{module} is not the sum"
        for module, delta in total.items()
        if float((made[module] - delta).abs().max()) > 1e-4 * max(size, 1e-30)
    ]


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
