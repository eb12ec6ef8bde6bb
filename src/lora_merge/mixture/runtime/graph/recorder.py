"""What records the work of a call and does it again: CUDA graphs, or a test's tape."""

from collections.abc import Callable
from typing import Any, Protocol

import torch

from lora_merge.errors import MethodError


class Recorder(Protocol):
    """What records the work of a call and does it again, on the same memory."""

    def warm(self, call: Callable[[], Any]) -> Any:
        """Run the call as it will be recorded, for whatever is made at first use."""

    def record(self, call: Callable[[], Any]) -> tuple[Any, Callable[[], object]]:
        """What the call returns, and what fills it anew."""


class CudaRecorder:
    """CUDA graphs, each with memory of its own."""

    def warm(self, call: Callable[[], Any]) -> Any:
        """On another stream, as the recording will be."""
        side, here = torch.cuda.Stream(), torch.cuda.current_stream()
        side.wait_stream(here)
        with torch.cuda.stream(side):
            result = call()
        here.wait_stream(side)
        return result

    def record(self, call: Callable[[], Any]) -> tuple[Any, Callable[[], object]]:
        """Nothing runs until the replay."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = call()
        return result, graph.replay


def recorder_for(device: torch.device) -> Recorder:
    """What records on a device.

    Raises:
        MethodError: If nothing does.
    """
    if device.type != "cuda":
        raise MethodError(
            f"graph=True records CUDA graphs, and the model is on {device.type}",
            "move the model to a GPU first, or leave graph out",
        )
    return CudaRecorder()
