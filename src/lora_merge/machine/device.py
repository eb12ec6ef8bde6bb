"""Which device work runs on, and how many pieces of it side by side."""

import contextlib
import threading
from collections.abc import Iterator

import torch

from lora_merge.errors import MethodError
from lora_merge.machine.parallel import default_jobs

_SIDE_BY_SIDE = 4  # on a GPU: one piece is read, two are computed, one is written
_SHARE = 0.8  # of the GPU's free memory; the rest is for what libraries take
_STREAMS = threading.local()


def pick_device(name: str) -> torch.device:
    """The torch device of a name; "auto" is a GPU if there is one.

    Raises:
        MethodError: If there is no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise MethodError(f"{name!r} is no device", "use auto, cpu, cuda or cuda:1") from error
    if device.type not in ("cpu", "cuda"):
        raise MethodError(f"{name} is no device for this", "use auto, cpu, cuda or cuda:1")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise MethodError(f"there is no device {name} here", "use --device cpu")
    return device


def workers_on(device: torch.device, jobs: int | None, peak_bytes: int) -> int:
    """Threads that work side by side; on a GPU no more than its free memory holds.

    Args:
        device: Where they compute.
        jobs: What was asked for; default: the CPUs this process may use, on a GPU four.
        peak_bytes: Working memory of one.
    """
    if device.type == "cpu":
        return jobs or default_jobs()
    fits = int(_SHARE * free_bytes(device)) // max(1, peak_bytes)
    return max(1, min(jobs or _SIDE_BY_SIDE, fits))


def free_bytes(device: torch.device) -> int:
    """Free memory of a GPU."""
    return torch.cuda.mem_get_info(device)[0]


@contextlib.contextmanager
def own_stream(device: torch.device) -> Iterator[None]:
    """On a GPU, a stream of this thread: its copies and kernels run beside those of others.

    It begins after what the device's ordinary stream has been given so far.
    """
    if device.type != "cuda":
        yield
        return
    known = _STREAMS.__dict__.setdefault("known", {})
    stream = known.get(device) or known.setdefault(device, torch.cuda.Stream(device))
    stream.wait_stream(torch.cuda.default_stream(device))
    with torch.cuda.stream(stream):
        yield
