"""X-LoRA's own checkpoints, in and out: three layouts are read, PEFT's is written.

| written by        | gate                                            | experts                   |
| ----------------- | ----------------------------------------------- | ------------------------- |
| xlora             | xlora_config.json, xlora_classifier.safetensors | folders, or elsewhere     |
|                   | (or .pt, a pickle: read only when asked to)     |                           |
| PEFT up to 0.19   | adapter_config.json (XLORA), `layers.<i>`       | folders 0, 1, ...         |
| PEFT 0.20 or later| the same, but the first layer is missing        | the same                  |

The last one has lost its gate (PEFT drops every tensor whose name holds `.0.`, which it takes for
expert 0). It is refused: no one can tell what the gate was.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_merge.errors import AdapterError, MethodError
from lora_merge.files.atomic import atomic_directory
from lora_merge.files.documents import read_json, validated
from lora_merge.files.names import place_below
from lora_merge.files.tensor_file import SafetensorsFile, load_pickle
from lora_merge.files.tensor_stream import write_tensors
from lora_merge.mixture.expert import make_experts, write_expert
from lora_merge.mixture.gates.gate import gate_spec
from lora_merge.mixture.mixture import Mixture
from lora_merge.mixture.training.base_model import layer_order

_LAYER = re.compile(r"internal_xlora_classifier\.layers\.(\d+)\.(weight|bias)$")
_ORIGINAL = re.compile(r"^(?:inner\.(\d+)|last)\.(weight|bias)$")


def import_xlora(
    folder: Path,
    *,
    experts: Sequence[str | Path] = (),
    order: Sequence[str] | None = None,
    base: str | None = None,
    allow_pickle: bool = False,
) -> Mixture:
    """Read an X-LoRA checkpoint of the original package or of PEFT.

    Args:
        folder: The checkpoint.
        experts: Where its experts are, in its order, if they are not inside.
        order: Modules in the order in which the checkpoint numbers its layers (see
            `layer_order`); needed for layerwise scalings, where the outputs depend on it.
        base: Base model to take that order from, if it is not given.
        allow_pickle: Read a `.pt` classifier, with torch's restricted unpickler.

    Raises:
        AdapterError: If it is no X-LoRA checkpoint, or its gate is not all there.
        MethodError: If it does something this runtime does not.
    """
    if (folder / "xlora_config.json").is_file():
        raw = _json(folder / "xlora_config.json")
        linears = _original_layers(folder, allow_pickle)
        names = [str(n) for n in raw.get("adapters", [])]
    else:
        raw = _json(folder / "adapter_config.json")
        if raw.get("peft_type") != "XLORA":
            raise AdapterError(
                f"{folder}: peft_type is {raw.get('peft_type')!r}, not XLORA",
                "give the directory that X-LoRA saved",
            )
        linears = _peft_layers(folder)
        names = [str(i) for i in range(len(raw.get("adapters", {})))]
    sizes = _check_layers(folder, raw, linears)
    count = len(names)
    found = list(experts) or [place_below(folder, name, str(folder)) for name in names]
    if len(found) != count:
        raise AdapterError(f"{folder}: {count} experts, {len(found)} given", "give each of them")
    opened = make_experts(found, names=None if experts else _labels(raw, names))
    spec = gate_spec("xlora", trained=True, **_settings(raw, count))
    modules = Mixture(
        [e.adapter for e in opened], "request", names=[e.name for e in opened]
    ).modules
    if spec.granularity == "module":
        if order is None and base is not None:
            order = layer_order(base, modules)
        linears[-1] = _reordered(folder, linears[-1], modules, order, count)
    elif sizes[-1] != count:
        raise AdapterError(
            f"{folder}: the classifier has {sizes[-1]} outputs for {count} experts", "get it again"
        )
    gate = {}
    for index, (weight, bias) in enumerate(linears):
        gate[f"classifier.{index}.weight"] = weight.float()
        gate[f"classifier.{index}.bias"] = bias.float()
    return Mixture.of(spec, opened, gate)


def export_xlora(
    mixture: Mixture, folder: Path, order: Sequence[str], *, force: bool = False
) -> None:
    """PEFT's X-LoRA layout as PEFT 0.19 and earlier read it.

    PEFT 0.20 and later load it too, but lose the gate when they save it again.

    Args:
        mixture: An X-LoRA mixture without a null expert.
        folder: To make.
        order: The modules as PEFT walks the base model; see `base.layer_order`.
        force: Replace an adapter directory that is there.
    """
    spec = mixture.spec
    if spec.signal != "hidden" or spec.null_expert or spec.value == "sigmoid":
        raise MethodError(f"the {spec.preset} gate is no X-LoRA gate", "export xlora mixtures")
    if spec.granularity == "module" and sorted(order) != mixture.modules:
        lost = sorted(set(mixture.modules) - set(order))
        raise MethodError(
            f"PEFT's X-LoRA weighs modules of the base alone, and {lost[0]} is none",
            "leave the experts and routers of MoE layers out of the adapters",
        )
    count, depth = mixture.num_experts, spec.depth
    tensors: dict[str, Tensor] = {}
    for index in range(depth):
        weight = mixture.gate[f"classifier.{index}.weight"]
        bias = mixture.gate[f"classifier.{index}.bias"]
        if index == depth - 1 and spec.granularity == "module":
            places = [mixture.modules.index(name) for name in order]
            weight = weight.view(len(places), count, -1)[places].flatten(0, 1)
            bias = bias.view(len(places), count)[places].flatten()
        stem = f"base_model.internal_xlora_classifier.layers.{2 * index}"  # ReLUs are in between
        tensors[f"{stem}.weight"], tensors[f"{stem}.bias"] = weight.contiguous(), bias.contiguous()
    config = {
        "peft_type": "XLORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": mixture.alignment.base_model,
        "hidden_size": mixture.gate["classifier.0.weight"].shape[1],
        "adapters": {str(i): str(folder / str(i)) for i in range(count)},  # PEFT wants full paths
        "enable_softmax": spec.value in ("softmax_all", "softmax_twice"),
        "enable_softmax_topk": spec.value in ("softmax", "softmax_twice"),
        "layerwise_scalings": spec.granularity == "module",
        "xlora_depth": depth,
        "xlora_size": spec.width,
        "xlora_dropout_p": 0.0,
        "softmax_temperature": spec.temperature,
        "top_k_lora": spec.top_k,
        "scaling_pass_value": 0.0 if spec.bypass else 1.0 / count,
        "global_scaling_weight": spec.factor(count),
        "use_trainable_adapters": False,
    }
    with atomic_directory(folder, force=force, inputs=mixture.files) as staging:
        for index, expert in enumerate(mixture.experts):
            (staging / str(index)).mkdir()
            write_expert(expert, staging / str(index))
        (staging / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
        path = staging / "adapter_model.safetensors"
        write_tensors(path, tensors)


def _settings(raw: Mapping[str, Any], count: int) -> dict[str, Any]:
    """X-LoRA's flags in terms of our gate."""
    softmax, again = raw.get("enable_softmax", True), raw.get("enable_softmax_topk", False)
    if not raw.get("enable_relu_and_dropout", True) and int(raw.get("xlora_depth", 1)) > 1:
        raise MethodError("a classifier without ReLU between its layers", "not supported")
    values = {
        (True, False): "softmax_all",
        (True, True): "softmax_twice",
        (False, True): "softmax",
        (False, False): "raw",
    }
    value = values[bool(softmax), bool(again)]
    first = raw.get("scaling_pass_value", 0.0)
    first = 1.0 / count if first is None else float(first)
    if first and abs(first - 1.0 / count) > 1e-6:
        raise MethodError(
            f"scaling_pass_value is {first}: the first pass runs without experts, or with all at "
            f"1/{count}",
            "not supported",
        )
    return {
        "value": value,
        "granularity": "module" if raw.get("layerwise_scalings") else "model",
        "temperature": float(raw.get("softmax_temperature", 1.0)) if softmax else 1.0,
        "top_k": raw.get("top_k_lora"),
        "scale": float(raw.get("global_scaling_weight", 1.0)),
        "depth": int(raw.get("xlora_depth", 1)),
        "width": int(raw.get("xlora_size", 2048)),
        "bypass": not first,
    }


def _peft_layers(folder: Path) -> list[tuple[Tensor, Tensor]]:
    path = folder / "adapter_model.safetensors"
    if not path.is_file() or path.stat().st_size < 16:
        return []
    file = SafetensorsFile(path, str(folder))
    found: dict[int, dict[str, Tensor]] = {}
    for name in file.entries():
        match = _LAYER.search(name)
        if match:
            found.setdefault(int(match[1]), {})[match[2]] = file.read(name)
    return [(found[i]["weight"], found[i]["bias"]) for i in sorted(found) if len(found[i]) == 2]


def _original_layers(folder: Path, allow_pickle: bool) -> list[tuple[Tensor, Tensor]]:
    found: dict[float, dict[str, Tensor]] = {}
    for name, tensor in _original_tensors(folder, allow_pickle).items():
        match = _ORIGINAL.match(name)
        if match:
            place = float("inf") if match[1] is None else float(match[1])
            found.setdefault(place, {})[match[2]] = tensor
    layers = []
    for place in sorted(found):
        weight = found[place]["weight"]
        bias = found[place].get("bias", torch.zeros(len(weight)))  # `use_bias: false`
        layers.append((weight, bias))
    return layers


def _original_tensors(folder: Path, allow_pickle: bool) -> dict[str, Tensor]:
    path, pickled = folder / "xlora_classifier.safetensors", folder / "xlora_classifier.pt"
    if path.is_file():
        file = SafetensorsFile(path, str(folder))
        return {name: file.read(name) for name in file.entries()}
    if not pickled.is_file():
        raise AdapterError(f"{folder}: no xlora_classifier.safetensors", "get the whole directory")
    if not allow_pickle:
        raise AdapterError(
            f"{folder}: the classifier is a pickle (xlora_classifier.pt)",
            "--allow-pickle reads it with torch's restricted unpickler, if you trust the source",
        )
    loaded = load_pickle(pickled, str(folder))
    return {str(name): loaded.read(name) for name in loaded.entries()}


def _check_layers(
    folder: Path, raw: Mapping[str, Any], linears: Sequence[tuple[Tensor, Tensor]]
) -> list[int]:
    """Widths between the layers; refuses a classifier that is not all there."""
    depth, width = int(raw.get("xlora_depth", 1)), int(raw.get("hidden_size", 0))
    sizes = [width]
    for weight, bias in linears:
        if weight.shape[1] != sizes[-1] or bias.shape != weight.shape[:1]:
            break
        sizes.append(weight.shape[0])
    if len(linears) != depth or len(sizes) != depth + 1:
        raise AdapterError(
            f"{folder}: the gate is not complete: {len(linears)} of {depth} layers of the "
            "classifier are in the file"
            + (", and the first is not among them" if len(sizes) == 1 else ""),
            "PEFT 0.20 and later lose it when saving; save it again with PEFT 0.19 or earlier from "
            "the process that trained it. A gate is never filled up with random numbers",
        )
    return sizes


def _reordered(
    folder: Path,
    last: tuple[Tensor, Tensor],
    modules: Sequence[str],
    order: Sequence[str] | None,
    count: int,
) -> tuple[Tensor, Tensor]:
    """From the checkpoint's numbering of layers to names in order."""
    weight, bias = last
    if order is None:
        raise MethodError(
            f"{folder}: its scalings are per layer, numbered as the base model's class lists them",
            "name the base model (--base), whose config tells the order",
        )
    if sorted(order) != sorted(modules) or len(weight) != len(order) * count:
        raise AdapterError(
            f"{folder}: {len(weight)} outputs for {len(order)} modules x {count} experts",
            "give the base model the checkpoint was trained on",
        )
    places = [list(order).index(name) for name in modules]
    weight = weight.view(len(order), count, -1)[places].flatten(0, 1)
    return weight, bias.view(len(order), count)[places].flatten()


def _labels(raw: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    adapters = raw.get("adapters")
    return [str(name) for name in adapters] if isinstance(adapters, dict) else list(names)


@dataclass(frozen=True)
class _File:
    """The fields of an X-LoRA config that are computed with."""

    adapters: dict[str, Any] | list[str]
    hidden_size: int = 0
    xlora_depth: int = 1
    xlora_size: int = 2048
    softmax_temperature: float = 1.0
    global_scaling_weight: float = 1.0
    scaling_pass_value: float | None = 0.0
    top_k_lora: int | None = None
    layerwise_scalings: bool | None = False
    enable_softmax: bool = True
    enable_softmax_topk: bool = False
    enable_relu_and_dropout: bool = True


def _json(path: Path) -> dict[str, Any]:
    raw = read_json(path, str(path.parent), error=AdapterError)
    if isinstance(raw, dict) and raw.get("peft_type", "XLORA") != "XLORA":
        return raw  # another kind of adapter, which the caller names
    return {"peft_type": "XLORA", **asdict(validated(_File, raw, str(path), error=AdapterError))}
