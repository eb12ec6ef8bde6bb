"""Files for image and video models: kohya, diffusers and ComfyUI."""

import hashlib
import json
from pathlib import Path
from typing import Any

from lora_merge.adapters.formats.file_format import FileFormat, Written
from lora_merge.adapters.forms import ModuleSpec
from lora_merge.errors import AdapterError
from lora_merge.files.header import header_bytes, header_text

# Where the older of sd-scripts' two hashes begins and ends in a file.
_LEGACY = (0x100000, 0x110000)
_HASHES = {"sshs_legacy_hash": 8, "sshs_model_hash": 64}


def _no_bias(plan: Written) -> None:
    if plan.biases:
        raise AdapterError(
            f"{plan.biases[0]} has a bias on B, which this format cannot hold", "write it for PEFT"
        )


def _only_layers(plan: Written) -> None:
    _no_bias(plan)
    for name, spec in plan.modules.items():
        if spec.form not in ("linear", "conv"):
            raise AdapterError(
                f"{name} is an adapter of {spec.form}, which this format cannot hold",
                "write it for PEFT",
            )


def _down_up(spec: ModuleSpec) -> tuple[str, str]:
    return f"{spec.name}.lora_down.weight", f"{spec.name}.lora_up.weight"


def _a_b(spec: ModuleSpec) -> tuple[str, str]:
    return f"{spec.name}.lora_A.weight", f"{spec.name}.lora_B.weight"


def _kohya_metadata(plan: Written) -> dict[str, str]:
    """What sd-scripts' tools show; its hashes are filled in once the tensors are there."""
    ranks = set(plan.ranks.values())
    rank = str(ranks.pop()) if len(ranks) == 1 else "Dynamic"
    said = {"ss_network_module": "networks.lora", "ss_network_dim": rank, "ss_network_alpha": rank}
    base = plan.config.get("base_model_name_or_path")
    if base:
        said["ss_base_model_version"] = str(base)
    return {**said, **{name: "0" * length for name, length in _HASHES.items()}}


def write_hashes(path: Path) -> None:
    """Put sd-scripts' hashes of the tensors into the header of a file that has room for them.

    `sshs_model_hash` is the SHA-256 of everything behind the header; `sshs_legacy_hash` that of
    64 KiB at 1 MiB of the same file without these two entries (`precalculate_safetensors_hashes`
    in sd-scripts, as AUTOMATIC1111's UI computes them).
    """
    with path.open("r+b") as file:
        text = header_text(file)
        data = file.tell()
        model = hashlib.file_digest(file, "sha256").hexdigest()
        header = json.loads(text)
        header["__metadata__"] = {
            k: v for k, v in header["__metadata__"].items() if k not in _HASHES
        }
        bare = header_bytes(header)
        file.seek(data + max(0, _LEGACY[0] - len(bare)))
        window = (bare[_LEGACY[0] :] + file.read(_LEGACY[1]))[: _LEGACY[1] - _LEGACY[0]]
        legacy = hashlib.sha256(window).hexdigest()[: _HASHES["sshs_legacy_hash"]]
        for name, value in (("sshs_model_hash", model), ("sshs_legacy_hash", legacy)):
            empty = f'"{name}":"{"0" * _HASHES[name]}"'.encode()
            text = text.replace(empty, f'"{name}":"{value}"'.encode())
        file.seek(8)
        file.write(text)


def _diffusers_metadata(plan: Written) -> dict[str, str]:
    """A LoraConfig for each component, as diffusers reads it from the header."""
    config: dict[str, Any] = {}
    for component in sorted({name.partition(".")[0] for name in plan.modules}):
        ranks = {
            name.partition(".")[2]: rank
            for name, rank in plan.ranks.items()
            if name.partition(".")[0] == component
        }
        largest = max(ranks.values())
        patterns = {"^" + n.replace(".", r"\."): r for n, r in ranks.items() if r != largest}
        for field, value in (
            ("r", largest),
            ("lora_alpha", largest),
            ("rank_pattern", patterns),
            ("alpha_pattern", patterns),
            ("target_modules", sorted(ranks)),
        ):
            config[f"{component}.{field}"] = value
    return {"format": "pt", "lora_adapter_metadata": json.dumps(config, sort_keys=True)}


KOHYA = FileFormat(
    name="kohya",
    title="kohya (sd-scripts, AUTOMATIC1111, ComfyUI)",
    naming="kohya",
    weights="lora.safetensors",
    keys=_down_up,
    scalars=lambda spec, rank: {f"{spec.name}.alpha": float(rank)},
    metadata=_kohya_metadata,
    check=_only_layers,
    finish=write_hashes,
)
DIFFUSERS = FileFormat(
    name="diffusers",
    title="diffusers",
    naming="diffusers",
    weights="pytorch_lora_weights.safetensors",
    keys=_a_b,
    metadata=_diffusers_metadata,
    check=_only_layers,
)
COMFYUI = FileFormat(
    name="comfyui",
    title="ComfyUI",
    naming="comfyui",
    weights="lora.safetensors",
    keys=_a_b,
    metadata=lambda plan: {"format": "pt"},
    check=_only_layers,
)
