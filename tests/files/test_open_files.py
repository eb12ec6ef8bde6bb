"""More adapters than a process may open at once."""

import subprocess
import sys
from pathlib import Path

import pytest

from builders import save_adapter
from lora_merge.adapters.adapter import Adapter
from lora_merge.errors import AdapterError

SHAPES = {"model.layers.0.mlp.up_proj": (4, 3)}


def merge(limit: int, adapters: str, out: Path) -> "subprocess.CompletedProcess[str]":
    """Merge in a process that may open so many files."""
    program = (
        "import resource, sys, torch\n"
        "import lora_merge.merge.run, lora_merge.merge.methods.registry\n"
        "import lora_merge.cli.views.merge, lora_merge.cli.commands.merge, pydantic, yaml\n"
        "from lora_merge.cli.app import run\n"
        f"resource.setrlimit(resource.RLIMIT_NOFILE, ({limit}, {limit}))\n"
        "sys.exit(run(['merge', sys.argv[1], '-M', 'svd', '--rank', '3', '-o', sys.argv[2]]))\n"
    )
    return subprocess.run(
        [sys.executable, "-c", program, adapters, str(out)], capture_output=True, text=True
    )


def test_320_adapters_merge_with_256_open_files(tmp_path: Path) -> None:
    for number in range(320):
        save_adapter(tmp_path / "in" / f"{number:03}", r=1, seed=number, shapes=SHAPES)
    done = merge(256, str(tmp_path / "in" / "*"), tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert Adapter.from_pretrained(tmp_path / "out").modules


def test_too_few_open_files_are_called_that(tmp_path: Path) -> None:
    for number in range(30):
        save_adapter(tmp_path / "in" / f"{number:03}", r=1, seed=number, shapes=SHAPES)
    done = merge(4, str(tmp_path / "in" / "*"), tmp_path / "out")
    assert done.returncode == 1 and "Too many open files" in done.stderr
    assert done.stderr.endswith("try: raise the limit of open files (ulimit -n)\n"), done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["in"]
    done = merge(20, str(tmp_path / "in" / "*"), tmp_path / "out")  # the remedy; 30 share a few
    assert done.returncode == 0, done.stderr


def test_a_file_that_changed_is_not_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lora_merge.files import tensor_file

    adapter = Adapter.from_pretrained(save_adapter(tmp_path / "a", seed=1))
    before = adapter.read("model.layers.0.mlp.up_proj")[0].clone()
    tensor_file.close_handles()  # as when 100 others were opened since
    assert adapter.read("model.layers.0.mlp.up_proj")[0].equal(before)
    save_adapter(tmp_path / "a", seed=2)
    tensor_file.close_handles()
    with pytest.raises(AdapterError, match="changed"):
        adapter.read("model.layers.0.mlp.up_proj")
