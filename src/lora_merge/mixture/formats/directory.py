"""The mixture directory: everything a mixture is, in files that other tools can read too.

adapter_config.json     peft_type LORA_MIXTURE, so that stock PEFT refuses it instead of
                        loading half of it
mixture_config.json     the gate's settings, the experts with their hashes, the modules in order
gate.safetensors        gate tensors, keyed by full module path
descriptors.safetensors what is known of the experts' texts, if they were described
experts/00-<name>/      each expert as a plain PEFT adapter, byte for byte as it came
README.md               model card
"""

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from lora_merge._version import __version__
from lora_merge.adapters.adapter import open_adapter
from lora_merge.adapters.references import CONFIG_NAME, WEIGHTS_NAME, Source, sha256
from lora_merge.errors import AdapterError, SourceError
from lora_merge.files.atomic import atomic_directory
from lora_merge.files.documents import read_json, validated
from lora_merge.files.hub import download, upload
from lora_merge.files.inputs import note_input
from lora_merge.files.names import check_link, place_below
from lora_merge.files.pages.cards import code, front_matter, one_line
from lora_merge.files.tensor_file import SafetensorsFile
from lora_merge.files.tensor_stream import write_tensors
from lora_merge.mixture.expert import Expert, slug, write_expert
from lora_merge.mixture.gates.gate import PRESETS, GateSpec
from lora_merge.mixture.insight.descriptors import PARTS, Descriptors

SCHEMA = 1
PEFT_TYPE = "LORA_MIXTURE"
CONFIG, GATE, EXPERTS = "mixture_config.json", "gate.safetensors", "experts"
DESCRIPTORS = "descriptors.safetensors"


@dataclass(frozen=True, eq=False)
class Contents:
    """What a mixture directory holds.

    Attributes:
        spec: The gate's settings.
        experts: Gated experts first, then the general ones.
        gate: The gate's tensors by name.
        modules: Wrapped modules in order; None where the directory does not say.
        base_model: Name of the base model, where an expert names it.
        descriptors: What is known of the experts' texts, or None.
    """

    spec: GateSpec
    experts: Sequence[Expert]
    gate: Mapping[str, Tensor]
    modules: Sequence[str] | None
    base_model: str | None
    descriptors: Descriptors | None


def save(mixture: Contents, folder: Path, *, force: bool = False) -> Path:
    """Write a mixture directory; it appears whole or not at all.

    Raises:
        OutputError: If the target cannot or must not be written.
    """
    inputs = [e.adapter.source.weights for e in mixture.experts if e.adapter.source]
    needed = sum(path.stat().st_size for path in inputs)
    with atomic_directory(folder, force=force, inputs=inputs, needed=needed) as staging:
        write(mixture, staging)
    return folder


def write(mixture: Contents, folder: Path) -> None:
    """Put a mixture's files into an existing directory."""
    entries = []
    for number, expert in enumerate(mixture.experts):
        path = f"{EXPERTS}/{number:02d}-{slug(expert.name)}"
        (folder / path).mkdir(parents=True)
        digest = write_expert(expert, folder / path)
        entries.append(_entry(expert, path, digest))
    write_tensors(folder / GATE, mixture.gate)
    base = mixture.base_model
    config: dict[str, Any] = {
        "schema_version": SCHEMA,
        "lora_merge_version": __version__,
        "base_model_name_or_path": base,
        "semantics": "output_mixture",
        "gate": mixture.spec.to_json(),
        "gate_sha256": sha256(folder / GATE),
        "modules": mixture.modules,
        "experts": entries,
    }
    if mixture.descriptors is not None:
        file = folder / DESCRIPTORS
        write_tensors(file, mixture.descriptors.tensors)
        described = list(mixture.descriptors.experts)
        config["descriptors"] = {"experts": described, "sha256": sha256(file)}
    _write_json(folder / CONFIG, config)
    task = next((e.adapter.config.task_type for e in mixture.experts), None)
    _write_json(
        folder / CONFIG_NAME,
        {"peft_type": PEFT_TYPE, "base_model_name_or_path": base, "task_type": task},
    )
    (folder / "README.md").write_text(_card(mixture), encoding="utf-8")


def load(ref: str | Path, *, verify: bool = True) -> Contents:
    """Open a mixture directory, or download one from the Hub.

    Args:
        ref: A directory, `user/repo` or `user/repo@revision`.
        verify: Compare the files' hashes with the config's.

    Raises:
        SourceError: If there is no mixture there.
        AdapterError: If its files are damaged or changed.
    """
    folder = _folder_of(ref)
    note_input(folder)
    raw = _read_config(folder, str(ref))
    spec = GateSpec.from_json(raw.gate)
    experts = [_read_expert(folder, entry, str(ref), verify) for entry in raw.experts]
    gate_path = folder / GATE
    if not gate_path.is_file():
        raise AdapterError(f"{ref}: {GATE} is missing", "get the whole directory again")
    if verify:
        _verify(gate_path, raw.gate_sha256, f"{ref}: {GATE}")
    file = SafetensorsFile(gate_path, str(ref))
    gate = {name: file.read(name) for name in file.entries()}
    descriptors = _read_descriptors(folder, raw.descriptors, str(ref), verify)
    base = raw.base_model_name_or_path
    return Contents(spec, experts, gate, raw.modules, base, descriptors)


def is_mixture(folder: Path) -> bool:
    """Whether a directory is a mixture."""
    return (folder / CONFIG).is_file()


def push(mixture: Contents, repo: str, *, private: bool = False) -> str:
    """Upload a mixture to the Hub; returns the URL of the commit.

    Raises:
        OutputError: If the Hub refuses it or cannot be reached.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "mixture"
        folder.mkdir()
        write(mixture, folder)
        return upload(folder, repo, private=private, message="Upload mixture of LoRA adapters")


def _folder_of(ref: str | Path) -> Path:
    path = Path(ref).expanduser()
    if path.is_dir():
        if not is_mixture(path):
            raise SourceError(
                f"{ref}: no {CONFIG} in this directory",
                "`lora-merge gate` makes mixtures; a plain adapter is loaded with PEFT",
            )
        return path
    if path.exists() or str(ref).count("/") != 1 or str(ref).startswith((".", "/", "~")):
        raise SourceError(f"{ref}: no such mixture directory", "check the path")
    repo, _, revision = str(ref).partition("@")
    patterns = ["*.json", GATE, DESCRIPTORS, f"{EXPERTS}/*/*.json", f"{EXPERTS}/*/*.safetensors"]
    found = download(str(ref), repo, revision or None, patterns)
    if not is_mixture(found):
        raise SourceError(f"{ref}: the repository holds no {CONFIG}", "it is no mixture")
    return found


@dataclass(frozen=True)
class _Entry:
    """An expert in the file."""

    name: str
    path: str
    general: bool = False
    source: str = ""
    sha256: str = ""


@dataclass(frozen=True)
class _Described:
    """The descriptors in the file."""

    experts: tuple[str, ...]
    sha256: str = ""


@dataclass(frozen=True)
class _File:
    """The part of a mixture's config that decides what it is."""

    gate: dict[str, Any]
    experts: tuple[_Entry, ...]
    gate_sha256: str = ""
    modules: list[str] | None = None
    base_model_name_or_path: str | None = None
    descriptors: _Described | None = None


def _read_config(folder: Path, ref: str) -> _File:
    raw = read_json(folder / CONFIG, ref, error=AdapterError)
    version = raw.get("schema_version") if isinstance(raw, dict) else None
    if version != SCHEMA:
        raise AdapterError(
            f"{ref}: {CONFIG} has schema_version {version!r}, this version reads {SCHEMA}",
            "update lora-merge",
        )
    if raw.get("semantics") != "output_mixture":
        raise AdapterError(f"{ref}: semantics {raw.get('semantics')!r}", "update lora-merge")
    file = validated(_File, raw, f"{ref}: {CONFIG}", error=AdapterError)
    if not file.experts or not all(entry.name.strip() for entry in file.experts):
        raise AdapterError(f"{ref}: {CONFIG} names no experts", "get it again")
    return file


def _read_expert(folder: Path, entry: _Entry, ref: str, verify: bool) -> Expert:
    name = entry.name
    place = place_below(folder, entry.path, f"{ref}: expert {name}")
    weights, config = place / WEIGHTS_NAME, place / CONFIG_NAME
    for path in (weights, config):
        check_link(folder, path, f"{ref}: expert {name}")
    if not weights.is_file() or not config.is_file():
        raise AdapterError(f"{ref}: expert {name} is missing at {entry.path}", "get it again")
    if verify:
        _verify(weights, entry.sha256, f"{ref}: expert {name}")
    adapter = open_adapter(Source(str(place), weights, config))
    return Expert(name, adapter, entry.general, entry.source, entry.sha256)


def _read_descriptors(
    folder: Path, entry: _Described | None, ref: str, verify: bool
) -> Descriptors | None:
    if entry is None:
        return None
    path = folder / DESCRIPTORS
    if not path.is_file():
        raise AdapterError(f"{ref}: {DESCRIPTORS} is missing", "get the whole directory again")
    if verify:
        _verify(path, entry.sha256, f"{ref}: {DESCRIPTORS}")
    file = SafetensorsFile(path, ref)
    tensors = {name: file.read(name) for name in file.entries()}
    experts = entry.experts
    parts = {name.rpartition(".")[2] for name in tensors}
    if parts != set(PARTS) or any(len(t) != len(experts) for t in tensors.values()):
        raise AdapterError(f"{ref}: {DESCRIPTORS} does not fit its experts", "describe them again")
    return Descriptors(experts, tensors)


def _verify(path: Path, wanted: str | None, what: str) -> None:
    if wanted and sha256(path) != wanted:
        raise AdapterError(
            f"{what} is not the file that was saved (its hash differs)",
            "get it again, or load with verify=False if the change is meant",
        )


def _entry(expert: Expert, path: str, digest: str) -> dict[str, Any]:
    config = expert.adapter.config
    return {
        "name": expert.name,
        "path": path,
        "general": expert.general,
        "r": max(expert.adapter.ranks()),
        "lora_alpha": config.lora_alpha,
        "use_rslora": config.use_rslora,
        "modules": len(expert.adapter.modules),
        "sha256": digest,
        "source": expert.source,
    }


def _card(mixture: Contents) -> str:
    base = mixture.base_model
    spec = mixture.spec
    public = base if base and not Path(base).exists() else None
    head = front_matter(
        library_name="lora-merge",
        base_model=public,
        base_model_relation="adapter" if public else None,
        tags=["lora", "mixture-of-loras", one_line(spec.preset)],
    )
    experts = [
        f"- {code(e.name)}{' (general, subtracted)' if e.general else ''}: "
        f"rank {max(e.adapter.ranks())}, {len(e.adapter.modules)} modules"
        for e in mixture.experts
    ]
    state = "" if spec.trained else "\nThe gate has its initial weights: train it before use.\n"
    what = PRESETS[spec.preset][0] if spec.preset in PRESETS else spec.signal
    body = [
        "# Mixture of LoRA adapters",
        "",
        f"Gate: {code(spec.preset)}, {what}.",
        state,
        f"Base model: {code(base) if base else 'not named by the experts'}.",
        "",
        *experts,
        "",
        "```python",
        "import lora_merge",
        "",
        'lora_merge.load_mixture(model, "this/directory")',
        "model.generate(...)",
        "```",
        "",
    ]
    return head + "\n" + "\n".join(body)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    text = json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n"
    path.write_text(text, encoding="utf-8")
