"""GGUF adapters for llama.cpp."""

from torch import Tensor

from lora_merge.adapters.dialects.language.gguf import ALPHA, ARCHITECTURE, BASE_MODEL
from lora_merge.adapters.formats.file_format import (
    Container,
    FileFormat,
    Written,
    by_expert,
    shapes_by_expert,
)
from lora_merge.adapters.forms import ModuleSpec, stored_shapes
from lora_merge.errors import AdapterError
from lora_merge.files.gguf.writing import GGUFStream, gguf_header


def _check(plan: Written) -> None:
    if plan.dtype == "F64":
        raise AdapterError("llama.cpp computes in no float64", "write it with --dtype float32")
    if plan.biases:
        raise AdapterError(f"{plan.biases[0]} has a bias on B, which GGUF has not", "use PEFT")
    if plan.extras:
        raise AdapterError(
            f"{min(plan.extras)} is no low-rank factor, and llama.cpp takes nothing else of an "
            "adapter",
            "merge the adapter with --extras drop first, if it does without",
        )
    for name, spec in plan.modules.items():
        if spec.form == "conv":
            raise AdapterError(f"{name} is a convolution, which GGUF adapters have not", "use PEFT")


def _shapes(spec: ModuleSpec, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    if spec.form == "embedding":
        return (spec.d_in, rank), (spec.d_out, rank)
    return shapes_by_expert(spec, rank) if spec.form == "experts" else stored_shapes(spec, rank)


def _arrange(spec: ModuleSpec, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    if spec.form == "embedding":
        return a.mT, b
    return by_expert(spec, a, b) if spec.form == "experts" else (a, b)


def _metadata(plan: Written) -> dict[str, str]:
    """An alpha of 0 means no scaling, at any rank."""
    said = {
        ARCHITECTURE: plan.architecture or "",
        "general.type": "adapter",
        "adapter.type": "lora",
        ALPHA: "0",
    }
    base = plan.config.get("base_model_name_or_path")
    return {**said, BASE_MODEL: str(base)} if base else said


GGUF = FileFormat(
    name="gguf",
    title="llama.cpp",
    naming="gguf",
    weights="adapter.gguf",
    keys=lambda spec: (f"{spec.name}.weight.lora_a", f"{spec.name}.weight.lora_b"),
    shapes=_shapes,
    arrange=_arrange,
    metadata=_metadata,
    check=_check,
    padded=False,
    container=Container(GGUFStream, gguf_header),
)
