"""What an adapter is whatever it is called: a fingerprint of what it stores."""

import hashlib
from collections.abc import Sequence

import torch

from lora_merge.adapters.adapter import Adapter


def fingerprints(adapters: Sequence[Adapter]) -> list[str]:
    """A fingerprint of each adapter; adapters that store the same have the same.

    Of the first module alone, where that tells all of them apart (a fraction of a millisecond
    each); of everything, where it does not.

    Args:
        adapters: Any order; the fingerprints do not depend on it.
    """
    first = [_fingerprint(adapter, list(adapter.modules)[:1]) for adapter in adapters]
    return [
        _fingerprint(adapter, list(adapter.modules)) if first.count(own) > 1 else own
        for adapter, own in zip(adapters, first, strict=True)
    ]


def _fingerprint(adapter: Adapter, modules: Sequence[str]) -> str:
    content = hashlib.blake2b(digest_size=16)
    for name in modules:
        content.update(f"{name} {adapter.modules[name].scaling!r}".encode())
        for tensor in adapter.read(name):
            content.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
            content.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return content.hexdigest()
