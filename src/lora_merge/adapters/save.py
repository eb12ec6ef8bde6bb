"""Save an adapter, from disk or from memory, as a PEFT directory, and publish it."""

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from lora_merge.adapters.alignment import align, read_stacks
from lora_merge.adapters.writer import AdapterWriter, plan_output
from lora_merge.files.atomic import atomic_directory, check_target
from lora_merge.files.hub import upload
from lora_merge.files.tensor_file import widest_dtype

if TYPE_CHECKING:
    from lora_merge.adapters.adapter import Adapter


def save_adapter(adapter: "Adapter", out: Path, *, force: bool = False) -> None:
    """Write an adapter in the portable layout (scaling folded, one rank), whole or not at all.

    Args:
        adapter: What to write.
        out: The directory to make.
        force: Replace an adapter directory that is there.

    Raises:
        OutputError: If it cannot be written; nothing is left behind.
    """
    alignment = align([adapter])
    plan = plan_output(
        [adapter],
        alignment.modules,
        {name: spec.rank for name, spec in adapter.modules.items()},
        dtype=widest_dtype(spec.dtype for spec in adapter.modules.values()),
        extras={name: (extra.dtype, extra.shape) for name, extra in adapter.extras.items()},
    )
    source = adapter.source
    inputs = [path for path in (source.weights, source.config) if path] if source else []
    check_target(out, force=force, inputs=inputs, needed=plan.num_bytes)
    with atomic_directory(out) as folder:
        with AdapterWriter(folder, plan) as writer:
            for module in alignment.modules:
                stacks = list(read_stacks(alignment, module))
                writer.add(module.name, stacks, adapter.read_bias(module.name))
            for name in adapter.extras:
                writer.add_extra(name, adapter.read_extra(name))
        for name, text in adapter.texts.items():
            (folder / name).write_text(text, encoding="utf-8")


def push_adapter(adapter: "Adapter", repo: str, *, private: bool = False) -> str:
    """Upload an adapter to a Hub repository; returns the address of the commit.

    Raises:
        OutputError: If the Hub refuses it or cannot be reached.
    """
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "adapter"
        save_adapter(adapter, target)
        return upload(target, repo, private=private, message="Upload LoRA adapter")
