"""The Triton kernels, on a GPU or, with TRITON_INTERPRET=1 set before Python starts, on the CPU.

Triton chooses its interpreter when it is imported, so `.ci/run` runs them apart.
"""

import os
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not find_spec("triton") or not (INTERPRETED or torch.cuda.is_available()):
    collect_ignore_glob = ["test_*.py"]


# Of Triton up to 3.6, in its interpreter; an error with numpy 2.4 (findings/).
_LOOPS = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(_LOOPS if INTERPRETED else pytest.mark.gpu)


@pytest.fixture
def device() -> str:
    return "cpu" if INTERPRETED else "cuda"


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory is full of NaN, so that an entry that a kernel forgets is seen."""
    empty = torch.empty

    def full_of_nan(*size: object, **how: object) -> torch.Tensor:
        fresh = empty(*size, **how)
        return fresh.fill_(torch.nan if fresh.is_floating_point() else 0x5A5A5A5A)

    monkeypatch.setattr(torch, "empty", full_of_nan)
