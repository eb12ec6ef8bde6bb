"""More adapters than a process may open at once."""

import subprocess
import sys
from pathlib import Path

import pytest

from builders import save_adapter
from lora_merge.adapters.adapter import Adapter
from lora_merge.errors import AdapterError

SHAPES = {"model.layers.0.mlp.up_proj": (4, 3)}


def test_320_adapters_merge_with_256_open_files(tmp_path: Path) -> None:
    for number in range(320):
        save_adapter(tmp_path / "in" / f"{number:03}", r=1, seed=number, shapes=SHAPES)
    program = (
        "import resource, sys\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))\n"
        "from lora_merge.cli.app import run\n"
        "sys.exit(run(['merge', sys.argv[1], '-M', 'svd', '--rank', '3', '-o', sys.argv[2]]))\n"
    )
    arguments = [str(tmp_path / "in" / "*"), str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert Adapter.from_pretrained(tmp_path / "out").modules


def test_a_file_that_changed_is_not_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lora_merge.files import tensor_file

    adapter = Adapter.from_pretrained(save_adapter(tmp_path / "a", seed=1))
    before = adapter.read("model.layers.0.mlp.up_proj")[0].clone()
    tensor_file._opened.cache_clear()  # as when 100 others were opened since
    assert adapter.read("model.layers.0.mlp.up_proj")[0].equal(before)
    save_adapter(tmp_path / "a", seed=2)
    tensor_file._opened.cache_clear()
    with pytest.raises(AdapterError, match="changed"):
        adapter.read("model.layers.0.mlp.up_proj")
