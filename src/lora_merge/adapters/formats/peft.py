"""PEFT's own directory."""

from lora_merge.adapters.dialects.spelling import PREFIX
from lora_merge.adapters.formats.file_format import FileFormat
from lora_merge.adapters.forms import ModuleSpec
from lora_merge.adapters.references import WEIGHTS_NAME


def _keys(spec: ModuleSpec) -> tuple[str, str]:
    if spec.form == "embedding":
        stem = f"{PREFIX}{spec.name}.lora_embedding_"
        return stem + "A", stem + "B"
    place = PREFIX + (spec.wrapper or spec.name)
    return f"{place}.lora_A.weight", f"{place}.lora_B.weight"


PEFT = FileFormat(
    name="peft",
    title="PEFT",
    naming="transformers",
    weights=WEIGHTS_NAME,
    keys=_keys,
    extra=lambda name: PREFIX + name,
    bias=lambda module: f"{PREFIX}{module}.lora_B.bias",
    config=lambda plan: plan.config,
)
