"""Several devices, and a Ray cluster: the bytes of one process; a failure leaves nothing."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import lora_merge
from builders import save_adapter
from lora_merge.cli.app import cli
from lora_merge.errors import LoraMergeError

SHAPES = {f"model.layers.{i}.mlp.up_proj": (24, 16) for i in range(12)}


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def adapters(folder: Path, **parts: Any) -> list[str]:
    parts = {"shapes": SHAPES, **parts}
    return [str(save_adapter(folder / f"a{i}", seed=i, **parts)) for i in range(3)]


def recipe_of(refs: list[str], method: str = "svd", **settings: Any) -> dict[str, Any]:
    return {"merge_method": method, "adapters": refs, "rank": 3, **settings}


def test_a_process_per_device_gives_the_same_bytes(tmp_path: Path) -> None:
    recipe = recipe_of(adapters(tmp_path), "ties", rank="energy:0.9", scale="auto")
    lora_merge.run_recipe(recipe, tmp_path / "whole", jobs=1)
    done: list[object] = []
    lora_merge.run_recipe(
        recipe, tmp_path / "out", devices="cpu,cpu", jobs=2, progress=lambda *of: done.append(of)
    )
    assert done[: len(SHAPES)] == [("merging", len(SHAPES))] * len(SHAPES)
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    assert not (tmp_path / "out.shards").exists()


def test_a_process_that_fails_leaves_nothing_and_says_why(tmp_path: Path) -> None:
    refs = adapters(tmp_path)
    path = Path(refs[1]) / "adapter_model.safetensors"
    data = bytearray(path.read_bytes())
    data[-4:] = b"\xff\xff\xff\x7f"  # NaN, in the last tensor
    path.write_bytes(data)
    with pytest.raises(LoraMergeError, match=r"a1: .*NaN"):
        lora_merge.run_recipe(recipe_of(refs), tmp_path / "out", devices="cpu,cpu")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a0", "a1", "a2"]


def test_what_does_not_go_together_is_refused(tmp_path: Path) -> None:
    recipe, out = recipe_of(adapters(tmp_path)), tmp_path / "out"
    for how, said in (
        ({"devices": "cpu,nowhere"}, "nowhere"),
        ({"devices": "cpu", "engine": "ray"}, "of this machine"),
        ({"address": "auto"}, "that of a Ray cluster"),
    ):
        with pytest.raises(LoraMergeError, match=said):
            lora_merge.run_recipe(recipe, out, **how)
    lora_merge.run_shard(recipe, out, "1/2")
    with pytest.raises(LoraMergeError, match="parts of an earlier run"):
        lora_merge.run_recipe(recipe, out, devices="cpu,cpu")
    lora_merge.run_recipe(recipe, out, devices="cpu,cpu", resume=True)
    assert out.is_dir()


def test_without_ray_the_remedy_is_to_install_it(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['ray'] = None\n"
        "from lora_merge.cli.app import run\n"
        "sys.exit(run(sys.argv[1:]))\n"
    )
    arguments = ["merge", *adapters(tmp_path), "--engine", "ray", "-o", str(tmp_path / "out")]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert done.returncode == 1
    assert "pip install 'lora-merge[ray]'" in done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a0", "a1", "a2"]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Three nodes of one CPU each on this machine."""
    pytest.importorskip("ray", reason="ray is not installed: pip install 'lora-merge[ray]'")
    import ray
    from ray.cluster_utils import Cluster

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    node = {"num_cpus": 1, "object_store_memory": 80_000_000}
    found = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    found.extra = [found.add_node(**node) for _ in range(2)]
    ray.init(address=found.address, logging_level="ERROR", log_to_driver=False)
    yield found
    ray.shutdown()
    found.shutdown()


@pytest.mark.filterwarnings("ignore")  # Ray's own
class TestRay:
    def test_two_merges_have_the_same_bytes(self, cluster: Any, tmp_path: Path) -> None:
        refs = adapters(tmp_path)
        for number, (method, settings) in enumerate(
            [("ties", {"parameters": {"scope": "global"}}), ("svd", {"rank": "energy:0.9"})]
        ):
            recipe = recipe_of(refs, method, scale="auto", **settings)
            lora_merge.run_recipe(recipe, tmp_path / f"whole{number}", jobs=1)
            lora_merge.run_recipe(recipe, tmp_path / f"out{number}", engine="ray")
            assert files(tmp_path / f"out{number}") == files(tmp_path / f"whole{number}")

    def test_an_error_in_a_task_is_the_error(self, cluster: Any, tmp_path: Path) -> None:
        refs = adapters(tmp_path)
        path = Path(refs[1]) / "adapter_model.safetensors"
        data = bytearray(path.read_bytes())
        data[-4:] = b"\xff\xff\xff\x7f"
        path.write_bytes(data)
        with pytest.raises(LoraMergeError, match=r"a1: .*NaN"):
            lora_merge.run_recipe(recipe_of(refs), tmp_path / "out", engine="ray")
        assert sorted(p.name for p in tmp_path.iterdir()) == ["a0", "a1", "a2"]

    def test_a_node_that_dies_costs_its_tasks_alone(self, cluster: Any, tmp_path: Path) -> None:
        recipe = recipe_of(adapters(tmp_path), "lego-refit", scale=1)
        lora_merge.run_recipe(recipe, tmp_path / "whole", jobs=1)
        done: list[object] = []

        def progress(*step: object) -> None:
            done.append(step)
            if len(done) == 2:
                cluster.remove_node(cluster.extra.pop(), allow_graceful=False)

        lora_merge.run_recipe(recipe, tmp_path / "out", engine="ray", progress=progress)
        assert len(done) >= len(SHAPES)
        assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_the_command_has_the_options(tmp_path: Path) -> None:
    refs = adapters(tmp_path)
    arguments = ["merge", *refs, "-M", "svd", "--rank", "3", "--json"]
    runner = CliRunner()
    for name, how in (("a", []), ("b", ["--devices", "cpu"]), ("c", ["--resume"])):
        out = str(tmp_path / "out" / name)
        result = runner.invoke(cli, [*arguments, "-o", out, *how], catch_exceptions=False)
        assert result.exit_code == 0
    one, *others = (files(tmp_path / "out" / name) for name in "abc")
    assert others == [one, one]
    shards = ["--shard", "1/1", "-o", str(tmp_path / "out" / "d")]
    assert runner.invoke(cli, [*arguments, *shards], catch_exceptions=False).exit_code == 0
    join = ["join", str(tmp_path / "out" / "d"), "--json"]
    assert runner.invoke(cli, join, catch_exceptions=False).exit_code == 0
    assert files(tmp_path / "out" / "d") == one
