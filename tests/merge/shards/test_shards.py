"""A merge in shards gives the bytes of one process, or says which shard does not belong."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from merging import made_up_statistics
from torch import nn

import lora_merge
from builders import adapter_parts, save_adapter, save_parts
from lora_merge.adapters.alignment import align, read_stacks
from lora_merge.errors import LoraMergeError
from lora_merge.files.tensor_stream import write_tensors
from lora_merge.merge.methods.registry import find_method, methods
from lora_merge.merge.plan import plan_merge
from lora_merge.merge.recipe.read import as_recipe, open_recipe
from lora_merge.merge.shards.folder import Shard


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def adapters(folder: Path, count: int = 3, **parts: Any) -> list[str]:
    return [str(save_adapter(folder / f"a{i}", seed=i, **parts)) for i in range(count)]


def recipe_of(refs: list[str], method: str = "svd", **settings: Any) -> dict[str, Any]:
    return {"merge_method": method, "adapters": refs, "seed": 3, **settings}


def shard(recipe: Mapping[str, Any], out: Path, name: str, **how: Any) -> Any:
    return lora_merge.run_shard(recipe, out, name, jobs=1, **how)


def same(recipe: Mapping[str, Any], tmp: Path, *counts: int) -> None:
    lora_merge.run_recipe(recipe, tmp / "whole", jobs=1)
    for count in counts:
        out = tmp / f"joined-{count}"
        for number in range(count, 0, -1):
            report = shard(recipe, out, f"{number}/{count}")
        assert report.missing == ()
        lora_merge.join(out, jobs=1)
        assert files(out) == files(tmp / "whole")
        assert not Path(f"{out}.shards").exists()


def statistics(path: Path, refs: list[str]) -> Path:
    """A file as `collect_statistics` writes it, of inputs that are functions of the deltas."""
    alignment = align(lora_merge.open_adapters(refs))
    tensors = {
        f"{module.name}.{key}": value.float() if value.is_floating_point() else value
        for module in alignment.modules
        for key, value in made_up_statistics(next(read_stacks(alignment, module))).items()
    }
    write_tensors(path, tensors, {"adapters": json.dumps(refs)})
    return path


@pytest.mark.parametrize("name", sorted(methods()))
def test_shards_give_the_bytes_of_one_process(name: str, tmp_path: Path) -> None:
    method = find_method(name)
    refs = adapters(tmp_path, min(3, method.adapters[1] or 3))
    settings: dict[str, Any] = {"rank": 3} if method.rank != "units" else {}
    if method.needs:
        settings["statistics"] = str(statistics(tmp_path / "statistics.safetensors", refs))
    same(recipe_of(refs, name, **settings), tmp_path, 1, 3, 16)


GLOBAL = [
    ("energy", "svd", {"rank": "energy:0.9"}),
    ("budget", "tsv", {"rank": "budget:x0.5"}),
    ("units", "cat", {}),
    ("threshold", "ties", {"rank": 3, "parameters": {"scope": "global"}}),
    ("majority", "ties", {"rank": 3, "parameters": {"scope": "global", "zero_sign": "majority"}}),
    ("outliers", "breadcrumbs", {"rank": 3, "parameters": {"scope": "global"}}),
    ("scale", "svd", {"rank": 3, "scale": "auto"}),
    ("norm", "wudi", {"rank": 3, "restore_norm": "weighted-mean"}),
    ("everything", "ties", {"rank": "energy:0.8", "scale": "auto", "svc": True, "pico": True}),
    ("automatic", "auto", {"scale": "auto"}),
    ("patterns", "svd", {"rank": "energy:0.9", "ranks": "per-module"}),
]


@pytest.mark.parametrize("name, method, settings", GLOBAL, ids=[g[0] for g in GLOBAL])
def test_what_is_global_is_the_same_for_shards(
    name: str, method: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    same(recipe_of(adapters(tmp_path), method, **settings), tmp_path, 3)


def test_biases_and_whole_modules_are_in_shards(tmp_path: Path) -> None:
    refs = []
    for seed in range(2):
        config, tensors = adapter_parts(
            seed=seed, lora_bias=True, modules_to_save=["score"], dtype=torch.bfloat16
        )
        random = torch.Generator().manual_seed(seed)
        for name in [n for n in tensors if n.endswith("lora_B.weight")]:
            bias = torch.randn(len(tensors[name]), generator=random)
            tensors[name.replace("weight", "bias")] = bias.bfloat16()
        tensors["base_model.model.score.weight"] = torch.randn(3, 4, generator=random)
        refs.append(str(save_parts(tmp_path / f"a{seed}", config, tensors)))
    for number, settings in enumerate(({"rank": 3}, {"rank": "energy:0.9"}, {"extras": "first"})):
        folder = tmp_path / str(number)
        folder.mkdir()
        same(recipe_of(refs, **settings), folder, 3)


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down_proj = nn.Parameter(torch.zeros(3, 8, 6))


def test_experts_are_in_shards(tmp_path: Path) -> None:
    refs = []
    for seed in range(2):
        torch.manual_seed(seed)
        config = peft.LoraConfig(r=2, target_modules=[], target_parameters=["experts.down_proj"])
        model = peft.get_peft_model(nn.ModuleDict({"experts": Experts()}), config)
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.3)
        model.save_pretrained(tmp_path / f"a{seed}", save_embedding_layers=False)
        refs.append(str(tmp_path / f"a{seed}"))
    same(recipe_of(refs, "lego-refit", rank=2), tmp_path, 3)


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_every_module_is_in_one_shard(count: int, tmp_path: Path) -> None:
    shapes = {f"model.layers.{i}.mlp.up_proj": (8 * (i % 3 + 1), 16) for i in range(12)}
    recipe = as_recipe(recipe_of(adapters(tmp_path, shapes=shapes), rank=3))
    plan = plan_merge(recipe, open_recipe(recipe))
    parts = [Shard(number, count).of(plan)[0] for number in range(1, count + 1)]
    assert sorted(name for part in parts for name in part) == sorted(shapes)
    loads = [sum(shapes[name][0] for name in part) for part in parts]
    assert max(loads) <= min(loads) + 24


def broken(tmp: Path, what: str) -> tuple[Path, str]:
    """Shards that must not be joined, and what is said of them."""
    refs = adapters(tmp)
    recipe, out = recipe_of(refs, rank=3), tmp / "out"
    first, second = (Path(f"{out}.shards") / f"{number}-of-2" for number in (1, 2))
    if what == "none":
        return out, r"there are no shards for .*out"
    shard(recipe, out, "1/2")
    if what == "missing":
        return out, r"2/2 are not done"
    shard(recipe_of(refs, rank=2) if what == "mixed recipes" else recipe, out, "2/2")
    if what == "mixed recipes":
        return (
            out,
            r"shard 2/2 is of another merge .* 1/2: the recipe.s rank is 2, and was 3",
        )
    if what == "mixed counts":
        shard(recipe, out, "1/3")
        return out, r"holds shards of 2 and of 3"
    if what == "foreign":
        (first / "mine.txt").write_text("x")
        return out, r"shard 1/2 is not as it was written: lora-merge did not write mine\.txt"
    if what == "damaged":
        path = sorted(second.glob("*.part"))[0]
        path.write_bytes(path.read_bytes()[:-1] + b"x")
        return out, r"shard 2/2 is not as it was written: .*\.part was changed"
    if what == "an adapter trained again":
        save_adapter(tmp / "a1", seed=7)
        return out, r"a1 has changed"
    if what == "an adapter changed between":
        path = tmp / "a1" / "adapter_model.safetensors"
        os.utime(path, ns=(1, 1))
        shard(recipe, out, "2/2", force=True)
        return out, r"shard 2/2 is of another merge than shard 1/2: .*a1 has changed \(modified\)"
    if what == "an adapter gone":
        (tmp / "a1" / "adapter_model.safetensors").unlink()
        return out, r"a1: no adapter_model\.safetensors"
    raise AssertionError(what)


@pytest.mark.parametrize(
    "what",
    [
        *("none", "missing", "mixed recipes", "mixed counts", "foreign", "damaged"),
        *("an adapter trained again", "an adapter changed between", "an adapter gone"),
    ],
)
def test_shards_that_do_not_belong_are_refused_by_name(what: str, tmp_path: Path) -> None:
    out, said = broken(tmp_path, what)
    shards = sorted(Path(f"{out}.shards").rglob("*"))
    with pytest.raises(LoraMergeError, match=said):
        lora_merge.join(out)
    assert not out.exists()
    assert sorted(Path(f"{out}.shards").rglob("*")) == shards


def test_a_shard_that_is_there_is_gone_on_with_or_begun_again_when_told(tmp_path: Path) -> None:
    refs = adapters(tmp_path)
    recipe, out = recipe_of(refs, rank=3), tmp_path / "out"
    assert shard(recipe, out, "1/2").found == 0
    with pytest.raises(LoraMergeError, match="there already"):
        shard(recipe, out, "1/2")
    assert shard(recipe, out, "1/2", resume=True).found == 2
    with pytest.raises(LoraMergeError, match="the recipe's rank is 2, and was 3"):
        shard(recipe_of(refs, rank=2), out, "1/2", resume=True)
    assert shard(recipe_of(refs, rank=2), out, "1/2", force=True).found == 0
    (Path(f"{out}.shards") / "1-of-2" / "mine.txt").write_text("x")
    with pytest.raises(LoraMergeError, match=r"did not write mine\.txt"):
        shard(recipe, out, "1/2", force=True)
    for text in ("0/2", "3/2", "a/b", "1", "1/2/3"):
        with pytest.raises(LoraMergeError, match="is no shard"):
            shard(recipe, out, text)


# Runs a merge that is killed when so many modules are done; 0 lets it end.
PROGRAM = """
import json, os, signal, sys
import lora_merge
recipe, out, kill = json.loads(sys.argv[1]), sys.argv[2], int(sys.argv[3])
done = 0
def on_step(what, total):
    global done
    done += 1
    if done == kill:
        os.kill(os.getpid(), signal.SIGKILL)
lora_merge.run_recipe(recipe, out, resume=True, jobs=1, progress=on_step)
"""


def test_a_killed_run_goes_on_from_what_is_done(tmp_path: Path) -> None:
    shapes = {f"model.layers.{i}.mlp.up_proj": (24, 16) for i in range(6)}
    refs = adapters(tmp_path, shapes=shapes)
    recipe, out = recipe_of(refs, rank="energy:0.9"), tmp_path / "out"
    lora_merge.run_recipe(recipe, tmp_path / "whole", jobs=1)
    command = [sys.executable, "-c", PROGRAM, json.dumps(recipe), str(out), "3"]
    killed = subprocess.run(command, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert not out.exists()
    parts = {p.name: p.stat().st_mtime_ns for p in Path(f"{out}.shards").rglob("*.part")}
    assert 2 <= len(parts) < 6

    done: list[object] = []
    changed = dict(recipe, rank="energy:0.5")
    with pytest.raises(LoraMergeError, match=r"rank is energy:0\.5, and was energy:0\.9"):
        lora_merge.run_recipe(changed, out, resume=True)
    lora_merge.run_recipe(
        recipe, out, resume=True, jobs=1, progress=lambda *step: done.append(step)
    )
    assert len(done) == 6 - len(parts)  # the rest alone
    assert files(out) == files(tmp_path / "whole")
    assert not Path(f"{out}.shards").exists()


def test_a_run_whose_inputs_changed_is_not_gone_on_with(tmp_path: Path) -> None:
    refs = adapters(tmp_path)
    recipe, out = recipe_of(refs, rank=3), tmp_path / "out"

    def interrupt(what: str, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        shard(recipe, out, "1/1", progress=interrupt)
    save_adapter(tmp_path / "a1", seed=7)
    with pytest.raises(LoraMergeError, match="a1 has changed"):
        lora_merge.run_recipe(recipe, out, resume=True)
    assert not out.exists()
