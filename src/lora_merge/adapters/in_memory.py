"""An adapter that is collected in memory instead of written to files."""

from torch import Tensor

from lora_merge.adapters.adapter import Adapter, build_adapter
from lora_merge.adapters.config import parse_config
from lora_merge.adapters.writer import OutputPlan, Writer
from lora_merge.files.tensor_file import TensorDict
from lora_merge.files.tensor_stream import cast_to


class MemoryWriter(Writer):
    """Collects an adapter in memory.

    Args:
        plan: What will be collected.
    """

    def __init__(self, plan: OutputPlan) -> None:
        super().__init__(plan)
        self._tensors: dict[str, Tensor] = {}
        self._entries = plan.entries()

    def _write(self, name: str, tensor: Tensor) -> None:
        code, _ = self._entries[name]
        self._tensors[name] = cast_to(tensor.detach().cpu(), code, name).contiguous()

    def adapter(self, name: str) -> Adapter:
        """What was collected, once every module is there."""
        return build_adapter(name, parse_config(self.plan.config, name), TensorDict(self._tensors))
