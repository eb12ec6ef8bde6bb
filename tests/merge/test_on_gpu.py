"""Merging on a GPU: what makes it so is tried on the CPU, and the numbers where there is one."""

from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from builders import save_adapter
from lora_merge.adapters.adapter import Adapter
from lora_merge.adapters.alignment import align, read_stacks
from lora_merge.errors import AdapterError
from lora_merge.machine import device as machine
from lora_merge.merge import executor
from lora_merge.merge.api import run_recipe
from lora_merge.merge.recipe.recipe import AdapterItem, Recipe

METHODS = ("lego", "lego-refit", "svd", "ties")
HALF, BRAIN, FULL = torch.float16, torch.bfloat16, torch.float32


def folders(tmp_path: Path, *kinds: torch.dtype) -> list[str]:
    return [
        str(save_adapter(tmp_path / f"a{i}", r=2 + i, seed=i, dtype=kind))
        for i, kind in enumerate(kinds)
    ]


def merged(method: str, paths: list[str], out: Path, **how: object) -> Path:
    run_recipe(Recipe(method, tuple(AdapterItem(path) for path in paths), 3), out, **how)
    return out


@pytest.mark.parametrize(
    "kinds", [(BRAIN,) * 3, (HALF,) * 2, (FULL, BRAIN), (HALF, BRAIN)], ids=str
)
def test_what_goes_by_way_of_the_host_is_the_same_to_the_bit(
    kinds: tuple[torch.dtype, ...], tmp_path: Path
) -> None:
    alignment = align([Adapter.from_pretrained(folder) for folder in folders(tmp_path, *kinds)])
    for module in alignment.modules:
        plain, staged = (next(read_stacks(alignment, module, staged=s)) for s in (False, True))
        for name in ("down", "up", "scale", "owner"):
            ours, theirs = getattr(staged, name), getattr(plain, name)
            assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)


def test_what_is_not_finite_is_named_there_too(tmp_path: Path) -> None:
    paths = folders(tmp_path, BRAIN, BRAIN)
    file = Path(paths[1]) / "adapter_model.safetensors"
    tensors = load_file(file)
    next(iter(tensors.values()))[0] = torch.nan
    save_file(tensors, file, metadata={"format": "pt"})
    alignment = align([Adapter.from_pretrained(path) for path in paths])
    with pytest.raises(AdapterError, match="a1"):
        for module in alignment.modules:
            next(read_stacks(alignment, module, staged=True))


@pytest.mark.parametrize("method", METHODS)
def test_a_merge_by_that_way_writes_the_same_bytes(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = folders(tmp_path, BRAIN, BRAIN, BRAIN)
    written = []
    for staged in (False, True):
        monkeypatch.setattr(executor, "read_stacks", partial(read_stacks, staged=staged))
        out = merged(method, paths, tmp_path / f"out{staged}", jobs=2)
        written.append((out / "adapter_model.safetensors").read_bytes())
    assert written[0] == written[1]


def test_as_many_modules_at_once_as_the_memory_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "free_bytes", lambda device: 10_000)
    gpu = torch.device("cuda")
    assert machine.workers_on(gpu, None, 100) == 4
    assert machine.workers_on(gpu, 16, 1000) == 8  # 80 % of what is free
    assert machine.workers_on(gpu, None, 4000) == 2
    assert machine.workers_on(gpu, None, 10**9) == 1
    assert machine.workers_on(torch.device("cpu"), 3, 10**9) == 3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("method", METHODS)
def test_a_gpu_merges_as_the_cpu_does(method: str, tmp_path: Path) -> None:
    """But for rounding: sums in another order, in float64 where a choice hangs on them."""
    paths, made = folders(tmp_path, FULL, FULL, FULL), []
    for place in ("cpu", "cuda"):
        out = merged(method, paths, tmp_path / place, device=place)
        alignment = align([Adapter.from_pretrained(out)])
        made.append({m.name: next(read_stacks(alignment, m)).delta() for m in alignment.modules})
    for name, delta in made[0].items():
        error = torch.linalg.norm(delta - made[1][name])
        assert float(error) <= 1e-4 * float(torch.linalg.norm(delta)), name
