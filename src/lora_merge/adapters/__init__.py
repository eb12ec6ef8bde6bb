"""Adapters on disk and as rank stacks: references, files, alignment, writing."""

from lora_merge.adapters.adapter import Adapter, ExtraSpec
from lora_merge.adapters.align import AlignedModule, Alignment, align, read_stacks
from lora_merge.adapters.atomic import (
    atomic_directory,
    atomic_file,
    check_file,
    check_parent,
    check_target,
)
from lora_merge.adapters.config import AdapterConfig, parse_config, read_config
from lora_merge.adapters.modules import ModuleSpec
from lora_merge.adapters.opening import build_adapter, open_adapter
from lora_merge.adapters.source import Source, download, expand, pin, resolve, sha256
from lora_merge.adapters.stack import RankStack
from lora_merge.adapters.tensors import (
    DTYPE_CODES,
    DTYPES,
    SafetensorsFile,
    TensorDict,
    commonest_dtype,
    load_pickle,
    widest_dtype,
)
from lora_merge.adapters.writer import (
    AdapterWriter,
    MemoryWriter,
    OutputPlan,
    RankLayout,
    Writer,
    plan_output,
)

__all__ = [
    "DTYPES",
    "DTYPE_CODES",
    "Adapter",
    "AdapterConfig",
    "AdapterWriter",
    "AlignedModule",
    "Alignment",
    "ExtraSpec",
    "MemoryWriter",
    "ModuleSpec",
    "OutputPlan",
    "RankLayout",
    "RankStack",
    "SafetensorsFile",
    "Source",
    "TensorDict",
    "Writer",
    "align",
    "atomic_directory",
    "atomic_file",
    "build_adapter",
    "check_file",
    "check_parent",
    "check_target",
    "commonest_dtype",
    "download",
    "expand",
    "load_pickle",
    "open_adapter",
    "parse_config",
    "pin",
    "plan_output",
    "read_config",
    "read_stacks",
    "resolve",
    "sha256",
    "widest_dtype",
]
