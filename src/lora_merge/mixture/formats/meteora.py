"""Mixtures that other tools saved: MeteoRA's checkpoints, and whatever a path holds."""

import re
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from lora_merge.adapters.adapter import Adapter, build_adapter
from lora_merge.adapters.dialects.spelling import PREFIX
from lora_merge.errors import AdapterError, MethodError
from lora_merge.files.inputs import note_input
from lora_merge.files.tensor_file import SafetensorsFile, TensorDict
from lora_merge.mixture.expert import Expert, make_experts
from lora_merge.mixture.formats.xlora import import_xlora
from lora_merge.mixture.gates.gate import gate_spec
from lora_merge.mixture.mixture import Mixture

_METEORA = re.compile(
    r"^(?:base_model\.model\.)?(?P<module>.+)\.(?P<part>moe_gate|lora_A|lora_B)"
    r"(?:\.default)?\.weight$"
)


def import_checkpoint(
    path: Path,
    *,
    experts: Sequence[str | Path] = (),
    base: str | None = None,
    top_k: int | None = None,
    temperature: float | None = None,
    allow_pickle: bool = False,
) -> Mixture:
    """Read whatever mixture checkpoint a path holds: a file is MeteoRA's, a directory X-LoRA's.

    Args:
        path: The checkpoint.
        experts: Its adapters in its order: MeteoRA's always, X-LoRA's where they are elsewhere.
        base: Base model, for X-LoRA's order of layers.
        top_k: MeteoRA's, which no checkpoint records.
        temperature: The same.
        allow_pickle: Read X-LoRA's classifier from a `.pt` file.

    Raises:
        AdapterError: If it is neither.
    """
    note_input(path)
    if path.is_file():
        return import_meteora(path, experts, top_k=top_k or 2, temperature=temperature or 1.0)
    if not path.is_dir():
        raise AdapterError(f"{path}: no such file or directory", "check the path")
    if top_k is not None or temperature is not None:
        raise MethodError("an X-LoRA checkpoint says top-k and temperature itself", "leave them")
    return import_xlora(path, experts=experts, base=base, allow_pickle=allow_pickle)


def import_meteora(
    weights: Path,
    adapters: Sequence[str | Path],
    *,
    top_k: int = 2,
    temperature: float = 1.0,
) -> Mixture:
    """Read a MeteoRA checkpoint: stacked experts and one linear gate per module.

    Args:
        weights: Its `model.safetensors`.
        adapters: The single-task adapters it was made from, in the order of its experts: their
            configs say how many ranks and which scaling each expert has. The checkpoint's own
            factors are used, since MeteoRA may have trained them further.
        top_k: As the model was run.
        temperature: The same; MeteoRA keeps it in its source code.

    Raises:
        AdapterError: If the tensors do not fit the adapters.
    """
    file = SafetensorsFile(weights, str(weights))
    keys: dict[str, dict[str, str]] = {}
    for name in file.entries():
        match = _METEORA.match(name)
        if match:
            keys.setdefault(match["module"], {})[match["part"]] = name
    complete = {m: k for m, k in keys.items() if len(k) == 3}
    if not complete or len(complete) != len(keys):
        missing = next((m for m in keys if m not in complete), "any module")
        raise AdapterError(
            f"{weights}: no moe_gate with lora_A and lora_B for {missing}",
            "give the model.safetensors that MeteoRA's training saved",
        )
    sources = [Adapter.from_pretrained(path) for path in adapters]
    tensors: list[dict[str, Tensor]] = [{} for _ in sources]
    gate: dict[str, Tensor] = {}
    for module, parts in sorted(complete.items()):
        rows = file.read(parts["moe_gate"])
        down, up = file.read(parts["lora_A"]), file.read(parts["lora_B"])
        ranks = [a.modules[module].rank if module in a.modules else 0 for a in sources]
        if len(rows) != len(sources) or sum(ranks) != len(down) or 0 in ranks:
            raise AdapterError(
                f"{weights}: {module}: {len(rows)} experts of {len(down)} ranks together, "
                f"the adapters have ranks {ranks}",
                "give the adapters it was made from, in its order",
            )
        gate[f"{module}.weight"] = rows.float()
        start = 0
        for expert, rank in enumerate(ranks):
            stem = f"{PREFIX}{module}.lora_"
            tensors[expert][stem + "A.weight"] = down[start : start + rank].clone()
            tensors[expert][stem + "B.weight"] = up[:, start : start + rank].clone()
            start += rank
    experts = [
        Expert(e.name, build_adapter(e.name, e.adapter.config, TensorDict(part)), source=e.source)
        for e, part in zip(make_experts(sources), tensors, strict=True)
    ]
    spec = gate_spec("meteora", top_k=top_k, temperature=temperature, trained=True)
    return Mixture.of(spec, experts, gate)
