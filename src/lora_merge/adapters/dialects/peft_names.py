"""Tensor names of PEFT checkpoints: which belong to the factors of which module."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from lora_merge.adapters.dialects.spelling import canonical, count_wraps
from lora_merge.errors import AdapterError

# `<module>.lora_A.weight`, `.lora_A.default.weight` (saved from a state dict with the adapter's
# name left in), `.lora_embedding_A` (a bare parameter) and `.lora_E` (AdaLoRA's gate).
_FACTOR = re.compile(
    r"^(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<half>[ABE])"
    r"(?:\.(?P<adapter>[^.]+))??(?:\.(?P<leaf>weight|bias))?$"
)
_COPIES = "copies left by PEFT's wrappers"
_SLOTS = {"A": "a", "B": "b", "E": "gate"}
# SoRA's trainer (OpenDelta) puts the factors into a child of the module, named "lora".
_SORA_CHILD = ".lora"
_LEGAL = re.compile(r"^[^\x00-\x1f/\\]+$")


@dataclass
class FactorKeys:
    """Tensor names of one module's factors.

    Attributes:
        embedding: Whether they are `lora_embedding_A` and `lora_embedding_B`.
        a: Name of A.
        b: Name of B.
        bias: Name of B's bias.
        gate: Name of the vector with one factor per unit: AdaLoRA's `lora_E`, SoRA's `gate`.
    """

    embedding: bool
    a: str | None = None
    b: str | None = None
    bias: str | None = None
    gate: str | None = None

    def all(self) -> tuple[str, ...]:
        """Names of all tensors that are there."""
        return tuple(key for key in (self.a, self.b, self.bias, self.gate) if key is not None)


@dataclass
class KeyTable:
    """All tensor names of a file, sorted into factors and everything else.

    Attributes:
        factors: By module name.
        extras: Name without prefix → name in the file, of tensors that are not factors.
        ignored: Name in the file → why the tensor changes nothing.
        rewrapped: Whether the prefix stood more than once (a PEFT model wrapped again).
    """

    factors: dict[str, FactorKeys] = field(default_factory=dict)
    extras: dict[str, str] = field(default_factory=dict)
    ignored: dict[str, str] = field(default_factory=dict)
    rewrapped: bool = False


def sort_keys(names: Iterable[str], adapter: str) -> KeyTable:
    """Sort tensor names into factors and extras.

    Raises:
        AdapterError: If two names mean the same tensor, or A stands without B.
    """
    table = KeyTable()
    adapter_names: dict[str, str] = {}
    for name in sorted(names):
        bare = canonical(name)
        table.rewrapped |= count_wraps(name) > 1
        match = _FACTOR.match(bare)
        if match is None:
            _put_extra(table, bare, name, adapter)
            continue
        adapter_names.setdefault(match["adapter"] or "without a name", name)
        _put_factor(table, match, name, adapter)
    if len(adapter_names) > 1:
        raise AdapterError(
            f"{adapter}: the file holds several adapters "
            f"({', '.join(f'{one}: {key}' for one, key in sorted(adapter_names.items()))})",
            "save each with peft's save_pretrained(selected_adapters=[...])",
        )
    _take_gates(table)
    _check_pairs(table, adapter)
    return table


def _put_factor(table: KeyTable, match: re.Match[str], name: str, adapter: str) -> None:
    module = match["module"]
    if not _LEGAL.match(module) or ".." in module:
        raise AdapterError(f"{adapter}: illegal module name {module!r}", "do not trust this file")
    keys = table.factors.setdefault(module, FactorKeys(embedding=bool(match["embedding"])))
    slot = _SLOTS[match["half"]]
    if match["leaf"] == "bias":
        if slot != "b":
            raise AdapterError(f"{adapter}: {module} has a bias on A, which no LoRA has", "")
        slot = "bias"
    if getattr(keys, slot) is not None or keys.embedding != bool(match["embedding"]):
        raise AdapterError(
            f"{adapter}: {name} and {getattr(keys, slot) or keys.a or keys.b} both name the same "
            f"factor of {module}",
            "save the adapter again with peft's save_pretrained",
        )
    setattr(keys, slot, name)


def _put_extra(table: KeyTable, bare: str, name: str, adapter: str) -> None:
    """Everything else; the copies that a saved wrapper leaves behind are folded away."""
    if ".original_module." in bare:
        table.ignored[name] = _COPIES  # the base model's own weights, kept by ModulesToSaveWrapper
        return
    if bare.endswith(".ranknum"):
        table.ignored[name] = _COPIES  # AdaLoRA's initial rank, which the config says too
        return
    whole = re.sub(r"\.modules_to_save(\.default)?\.", ".", bare)
    if whole in table.extras:  # stored a second time under the wrapper's name
        table.ignored[name if whole != bare else table.extras[whole]] = _COPIES
        if whole != bare:
            return
    table.extras[whole] = name
    if not _LEGAL.match(whole):
        raise AdapterError(f"{adapter}: illegal tensor name {name!r}", "do not trust this file")


def _take_gates(table: KeyTable) -> None:
    """A bare parameter `gate` beside A and B is SoRA's; the module is then their parent's."""
    for module in list(table.factors):
        gate = table.extras.pop(f"{module}.gate", None)
        if gate is None:
            continue
        keys = table.factors.pop(module)
        keys.gate = gate
        table.factors[module.removesuffix(_SORA_CHILD)] = keys


def _check_pairs(table: KeyTable, adapter: str) -> None:
    for module, keys in table.factors.items():
        if keys.a is None or keys.b is None:
            missing, there = ("A", "B") if keys.a is None else ("B", "A")
            raise AdapterError(
                f"{adapter}: {module} has lora_{there} but no lora_{missing}",
                "the file is incomplete; save or download it again",
            )
