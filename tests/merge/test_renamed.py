"""What a result is does not depend on what the adapters' directories are called."""

from itertools import permutations
from pathlib import Path
from typing import Any

import pytest

import lora_merge
from builders import save_adapter

KINDS: dict[str, list[dict[str, Any]]] = {
    "other configs": [
        {"seed": 1, "task_type": "CAUSAL_LM", "use_rslora": True, "target_modules": "all-linear"},
        {"seed": 2, "task_type": "FEATURE_EXTRACTION", "alpha": 3},
        {"seed": 3, "task_type": None, "r": 2, "revision": "main"},
    ],
    "other base models": [
        {"seed": 1, "base_model_name_or_path": "one/model"},
        {"seed": 2, "base_model_name_or_path": "another/model"},
        {"seed": 3, "base_model_name_or_path": None},
    ],
    "the same tensors": [
        {"seed": 1, "task_type": "CAUSAL_LM"},
        {"seed": 1, "task_type": "FEATURE_EXTRACTION", "revision": "main"},
        {"seed": 1, "task_type": None, "target_modules": "all-linear"},
    ],
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["ties", "lego-refit"])
def test_renaming_the_directories_changes_nothing(kind: str, method: str, tmp_path: Path) -> None:
    made = set()
    for number, names in enumerate(permutations("abc")):
        folder = tmp_path / str(number)
        for name, parts in zip(names, KINDS[kind], strict=True):
            save_adapter(folder / name, **parts)
        out = folder / "out"
        lora_merge.run_recipe(
            {
                "merge_method": method,
                "rank": 4,
                "adapters": [str(folder / name) for name in "abc"],
                "accept_base_models": True,
            },
            out,
        )
        files = ("adapter_config.json", "adapter_model.safetensors")
        made.add(tuple((out / file).read_bytes() for file in files))
    assert len(made) == 1
