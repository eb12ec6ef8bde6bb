"""Files of shards come from other runs: what is not as they write it is an error that names it."""

import json
from pathlib import Path
from typing import Any

import pytest

import lora_merge
from builders import save_adapter
from lora_merge.errors import LoraMergeError
from lora_merge.files.stamp import begin_stamp, finish_stamp


def recipe_of(folder: Path, **settings: Any) -> dict[str, Any]:
    refs = [str(save_adapter(folder / f"a{i}", seed=i)) for i in range(3)]
    return {"merge_method": "svd", "adapters": refs, "rank": 3, **settings}


def shard(recipe: dict[str, Any], out: Path, name: str, **how: Any) -> Any:
    return lora_merge.run_shard(recipe, out, name, jobs=1, **how)


@pytest.mark.parametrize(
    ("file", "change", "said"),
    [
        ("1-of-2/plan.json", {"facts": {"adapters": [{}]}}, r"plan\.json is damaged"),
        ("1-of-2/plan.json", {"recipe": "[" * 99}, "shard's recipe"),
        ("1-of-2/plan.json", {"decided": {"scale": "auto", "reason": "", "shared": 3}}, "damaged"),
        ("1-of-2/shard.json", {"sha256": ["a"]}, r"shard\.json is damaged"),
        ("1-of-2/part", b"", "part is damaged"),
        ("1-of-2/part", b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', "is damaged"),
    ],
)
def test_files_of_shards_are_held_to_what_their_writer_writes(
    file: str, change: Any, said: str, tmp_path: Path
) -> None:
    """Also where the stamp lists the damage, as it does after a run that went on from it."""
    recipe, out = recipe_of(tmp_path), tmp_path / "out"
    for part in ("1/2", "2/2"):
        shard(recipe, out, part)
    folder = Path(f"{out}.shards")
    path = folder / file
    if isinstance(change, bytes):
        path = next((folder / "1-of-2").glob("*.part"))
        path.write_bytes(len(change).to_bytes(8, "little") + change + bytes(4 if change else 0))
    else:
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
    finish_stamp(folder / "1-of-2")
    with pytest.raises(LoraMergeError, match=said):
        lora_merge.join(out)
    assert not out.exists()


@pytest.mark.parametrize(
    "change",
    [
        {"scale": "auto"},
        {"scale": float("nan")},
        {"shared": {"low": [1]}},
        {"more": [[[]]] * 3},
        [],
    ],
)
def test_what_was_decided_is_held_to_the_plan(change: Any, tmp_path: Path) -> None:
    recipe, out = recipe_of(tmp_path, scale="auto"), tmp_path / "out"
    shard(recipe, out, "1/2")
    (path,) = Path(f"{out}.shards").glob("decided-*.json")
    known = json.loads(path.read_text())
    path.write_text(json.dumps(known | change if isinstance(change, dict) else change))
    if isinstance(change, dict) and "more" in change:
        shard(recipe, out, "2/2")  # what a later version may add
        return
    with pytest.raises(LoraMergeError, match=r"decided-.*(\n|.)*try: delete it"):
        shard(recipe, out, "2/2")
    assert path.exists() and not (Path(f"{out}.shards") / "2-of-2").exists()


def test_results_without_a_plan_are_not_gone_on_with(tmp_path: Path) -> None:
    recipe, out = recipe_of(tmp_path), tmp_path / "out"
    shard(recipe, out, "1/2")
    folder = Path(f"{out}.shards") / "1-of-2"
    for name in ("plan.json", "shard.json"):
        (folder / name).unlink()
    begin_stamp(folder)
    with pytest.raises(LoraMergeError, match=r"plan\.json(\n|.)*--force without --resume"):
        shard(recipe, out, "1/2", resume=True)
    assert shard(recipe, out, "1/2", force=True).found == 0
