"""Writing: the safetensors stream, adapters, and the Hub."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from builders import adapter_parts, make_adapter, save_parts
from lora_merge.adapters.adapter import Adapter
from lora_merge.adapters.alignment import align
from lora_merge.adapters.forms import ModuleSpec
from lora_merge.adapters.in_memory import MemoryWriter
from lora_merge.adapters.rank_stack import RankStack
from lora_merge.adapters.writer import AdapterWriter, OutputPlan, plan_output
from lora_merge.errors import AdapterError, OutputError
from lora_merge.files.tensor_stream import SafetensorsStream

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}
shapes = st.lists(st.integers(0, 5), max_size=3).map(tuple)


@given(
    tensors=st.dictionaries(
        st.text(min_size=1, max_size=8).filter(lambda name: name != "__metadata__"),
        st.tuples(st.sampled_from(sorted(DTYPES)), shapes),
        max_size=6,
    ),
    reverse=st.booleans(),
)
def test_safetensors_reads_what_the_stream_writes(
    tensors: dict[str, tuple[str, tuple[int, ...]]],
    reverse: bool,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    path = tmp_path_factory.mktemp("stream") / "x.safetensors"
    random = torch.Generator().manual_seed(0)
    values = {
        name: torch.randn(shape, generator=random).to(DTYPES[code])
        for name, (code, shape) in tensors.items()
    }
    with SafetensorsStream(path, tensors) as stream:
        for name in sorted(values, reverse=reverse):
            stream.write(name, values[name])
    assert path.stat().st_size == stream.size
    loaded = load_file(path)
    assert loaded.keys() == values.keys()
    for name, value in values.items():
        assert loaded[name].dtype == value.dtype
        assert torch.equal(loaded[name], value)
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_a_tensor_never_written_is_a_bug_that_shows(tmp_path: Path) -> None:
    entries = {"a": ("F32", (2,)), "b": ("F32", (2,))}
    with (
        pytest.raises(ValueError, match="never written"),
        SafetensorsStream(tmp_path / "x", entries) as stream,
    ):
        stream.write("a", torch.zeros(2))


def test_what_a_dtype_cannot_hold_is_not_written_as_infinity(tmp_path: Path) -> None:
    loud = RankStack.of([(torch.full((1, 3), 1e6), torch.full((2, 1), 1e6), 1.0)])
    spec = ModuleSpec("m", "linear", 2, 3, 1, 1.0, "F32", "a", "b")
    plan = OutputPlan({"m": spec}, {"m": 1}, "F16", (), {}, {})
    with AdapterWriter(tmp_path, plan) as file:
        for writer in (file, MemoryWriter(plan)):
            with pytest.raises(OutputError, match=r"m\.lora_A.* float16") as caught:
                writer.add("m", [loud])
            assert "bfloat16" in caught.value.remedy
            writer.add("m", [replace(loud, scale=loud.scale * 1e-9)])


def test_whole_numbers_among_the_whole_tensors_are_named(tmp_path: Path) -> None:
    config, tensors = adapter_parts(modules_to_save=["bn"])
    tensors["base_model.model.bn.num_batches_tracked"] = torch.tensor(3)
    save_parts(tmp_path / "in", config, tensors)
    adapter = Adapter.from_pretrained(tmp_path / "in")
    with pytest.raises(AdapterError, match=r"bn.num_batches_tracked is I64"):
        adapter.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_adapter_goes_to_the_hub_whole_or_with_a_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a Hub that is a directory."""
    made: list[tuple[str, bool]] = []

    class Api:
        def create_repo(self, repo: str, private: bool, exist_ok: bool) -> None:
            huggingface_hub.utils.validate_repo_id(repo)
            made.append((repo, private))

        def upload_folder(self, repo_id: str, folder_path: Path, commit_message: str) -> Any:
            shutil.copytree(folder_path, tmp_path / "hub")
            return SimpleNamespace(commit_url="https://hub/commit/1")

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    adapter = make_adapter()
    assert adapter.push_to_hub("me/mine", private=True) == "https://hub/commit/1"
    assert made == [("me/mine", True)]
    assert Adapter.from_pretrained(tmp_path / "hub").modules.keys() == adapter.modules.keys()
    with pytest.raises(OutputError, match="me//mine: the Hub did not take it"):
        adapter.push_to_hub("me//mine")


def test_the_planned_size_is_the_files_size() -> None:
    adapters = [make_adapter("a"), make_adapter("b", r=2)]
    alignment = align(adapters)
    ranks = {m.name: 3 for m in alignment.modules}
    plan = plan_output(adapters, alignment.modules, ranks, dtype="BF16")
    assert plan.num_bytes > 2 * 3 * sum(m.first.d_in + m.first.d_out for m in alignment.modules)


def test_exact_patterns_name_one_module_each() -> None:
    adapters = [make_adapter("a", rank_pattern={"up_proj": 6})]
    alignment = align(adapters)
    ranks = {m.name: m.num_units for m in alignment.modules}
    plan = plan_output(adapters, alignment.modules, ranks, dtype="F32", layout="per-module")
    config = json.loads(json.dumps(dict(plan.config)))
    assert config["r"] == config["lora_alpha"] == 6
    assert config["rank_pattern"] == config["alpha_pattern"]
    assert sorted(config["rank_pattern"].values()) == [4, 4]
