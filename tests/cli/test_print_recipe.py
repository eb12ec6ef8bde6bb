"""Every flag that shapes a result is in the printed recipe, and means the same when read back."""

from dataclasses import asdict
from pathlib import Path

import pytest
import yaml

from builders import save_adapter
from lora_merge.cli.app import run
from lora_merge.cli.commands.merge import command
from lora_merge.merge.recipe.read import parse_recipe

# How to run, not what to make.
RUNNING = {
    "adapters",
    "out",
    "force",
    "device",
    "jobs",
    "dry_run",
    "as_json",
    "allow_pickle",
    "resume",
    "shard",
    "engine",
    "address",
    "devices",
}
RUNNING |= {"print_recipe", "strict"}
# Option → what to write, and where the recipe says so.
FLAGS = {
    "method": (["-M", "svd"], "merge_method", "svd"),
    "rank": (["--rank", "energy:0.9"], "rank", "energy:0.9"),
    "parameters": (["-p", "elect=none"], "parameters", {"elect": "none"}),
    "density": (["--density", "[0.1, 0.2]"], "parameters", {"density": [0.1, 0.2]}),
    "compat": (["--compat", "peft"], "parameters", {"compat": "peft"}),
    "side": (["-M", "wudi", "--side", "output"], "parameters", {"side": "output"}),
    "normalize": (["--normalize", "sum"], "normalize", "sum"),
    "scale": (["--scale", "0.5"], "scale", 0.5),
    "norm_equalise": (["--norm-equalise"], "norm_equalise", True),
    "restore_norm": (["--restore-norm", "mean"], "restore_norm", "mean"),
    "pico": (["--pico"], "pico", True),
    "svc": (["--svc"], "svc", True),
    "space": (["--space", "core"], "space", "core"),
    "basis": (["--basis", "stacks"], "basis", "stacks"),
    "smooth": (["--smooth", "flat"], "smooth", "flat"),
    "exact": (["--exact"], "exact", True),
    "statistics": (["--statistics", "file"], "statistics", "file"),
    "weights": (["-w", "1", "-w", "[0.0, 1.0]"], "adapters", {"weight": [0.0, 1.0]}),
    "alpha": (["--alpha", "8"], "adapters", {"alpha": 8}),
    "rslora": (["--rslora"], "adapters", {"rslora": True}),
    "rename": (["--rename", "model.=lm."], "rename", ("model.=lm.",)),
    "dtype": (["--dtype", "float16"], "dtype", "float16"),
    "ranks": (["--ranks", "per-module"], "ranks", "per-module"),
    "extras": (["--extras", "drop"], "extras", "drop"),
    "experts": (["--experts", "per-expert"], "experts", "per-expert"),
    "seed": (["--seed", "7"], "seed", 7),
    "schedule": (["--schedule", "linear"], "adapters", {"weight": 2 / 3}),
    "base": (["--base", "folder"], "base", "folder"),
    "accept_base_models": (["--accept-base-models"], "accept_base_models", True),
}


def test_no_flag_is_forgotten() -> None:
    assert {parameter.name for parameter in command.params} == RUNNING | set(FLAGS)


@pytest.mark.parametrize("name", FLAGS)
def test_a_flag_survives_the_round_trip(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, key, value = FLAGS[name]
    folders = [str(save_adapter(tmp_path / n, seed=i)) for i, n in enumerate("ab")]
    texts = []
    for given in (arguments, []):
        assert run(["merge", *folders, "-M", "ties", *given, "--print-recipe"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] != texts[1]
    recipe = parse_recipe(yaml.safe_load(texts[0]), "printed")
    assert recipe.to_yaml() == texts[0]
    found = asdict(recipe)[key]
    if key == "adapters":  # the second one's, where they differ
        assert value.items() <= found[1].items()
    else:
        assert found == value
