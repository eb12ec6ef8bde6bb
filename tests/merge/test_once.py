"""What a merge has to find out, it finds out once."""

import hashlib
from pathlib import Path

import pytest
import yaml

import lora_merge
from builders import save_adapter
from lora_merge.adapters import alignment, references
from lora_merge.cli.app import run
from lora_merge.merge import plan


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    counts: dict[str, int] = {}

    def count(name: str, *homes: object) -> None:
        real = getattr(homes[0], name)

        def counting(*arguments: object, **keywords: object) -> object:
            counts[name] = counts.get(name, 0) + 1
            return real(*arguments, **keywords)

        for home in homes:
            monkeypatch.setattr(home, name, counting)

    count("align", alignment, plan)
    count("sha256", references)
    return counts


def test_a_run_aligns_and_hashes_once(tmp_path: Path, counted: dict[str, int]) -> None:
    folders = [save_adapter(tmp_path / n, r=i + 2, seed=i) for i, n in enumerate("abc")]
    first = tmp_path / "first"
    assert run(["cluster", *map(str, folders), "--rank", "4", "-o", str(first)]) == 0
    assert counted == {"align": 1, "sha256": 3}
    counted.clear()
    again = tmp_path / "again"
    assert run(["run", str(first / "lora_merge.yaml"), "-o", str(again)]) == 0
    assert counted == {"align": 1, "sha256": 3}
    assert (again / "adapter_model.safetensors").read_bytes() == (
        first / "adapter_model.safetensors"
    ).read_bytes()
    recipe = yaml.safe_load((first / "lora_merge.yaml").read_text())
    weights = {Path(folder, "adapter_model.safetensors") for folder in folders}
    assert {item["sha256"] for item in recipe["adapters"]} == {
        hashlib.sha256(path.read_bytes()).hexdigest() for path in weights
    }


def test_run_recipe_is_the_command(tmp_path: Path) -> None:
    folders = [save_adapter(tmp_path / n, seed=i) for i, n in enumerate("ab")]
    recipe = {"merge_method": "ties", "adapters": [str(folders[0].parent / "[ab]")], "rank": 3}
    report = lora_merge.run_recipe(recipe, tmp_path / "python").report
    assert report.total().rank == (3, 3)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert run(["run", str(tmp_path / "recipe.yaml"), "-o", str(tmp_path / "command")]) == 0
    for name in ("adapter_model.safetensors", "adapter_config.json", "lora_merge.yaml"):
        assert (tmp_path / "python" / name).read_bytes() == (
            tmp_path / "command" / name
        ).read_bytes()
