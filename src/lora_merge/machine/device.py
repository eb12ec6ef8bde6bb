"""Which device work runs on."""

import torch

from lora_merge.errors import MethodError


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
