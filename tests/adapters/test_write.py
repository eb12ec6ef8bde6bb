"""Writing: the safetensors stream, atomic directories, and what they refuse."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
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

from builders import adapter_parts, make_adapter, save_adapter, save_parts
from lora_merge.adapters.adapter import Adapter
from lora_merge.adapters.alignment import align
from lora_merge.adapters.forms import ModuleSpec
from lora_merge.adapters.in_memory import MemoryWriter
from lora_merge.adapters.rank_stack import RankStack
from lora_merge.adapters.writer import AdapterWriter, OutputPlan, plan_output
from lora_merge.errors import AdapterError, OutputError
from lora_merge.files.atomic import atomic_directory, atomic_file, check_target
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


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("there", [None, "empty", "adapter"])
def test_a_directory_appears_whole(there: str | None, tmp_path: Path) -> None:
    target = tmp_path / "deep" / "out"
    if there:
        target.mkdir(parents=True)
    if there == "adapter":
        save_adapter(target)
        (target / "stale.txt").write_text("old")
    with atomic_directory(target) as folder:
        (folder / "new").write_text("x")
    assert files(target) == {"new": b"x"}
    assert [p.name for p in target.parent.iterdir()] == ["out"]
    assert target.stat().st_mode & 0o777 == 0o777 & ~current_umask()


def current_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_an_error_leaves_what_was_there(error: type[BaseException], tmp_path: Path) -> None:
    target = save_adapter(tmp_path / "out")
    before = files(target)
    with pytest.raises(error), atomic_directory(target) as folder:
        (folder / "half").write_text("x")
        raise error
    assert files(target) == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_file_appears_whole_or_not_at_all(error: type[BaseException], tmp_path: Path) -> None:
    target = tmp_path / "numbers.csv"
    with atomic_file(target) as path:
        path.write_text("old")
        assert not target.exists() and path.suffix == ".csv"
    assert target.stat().st_mode & 0o777 == 0o666 & ~current_umask()
    with pytest.raises(error), atomic_file(target) as path:
        path.write_text("half")
        raise error
    assert files(tmp_path) == {"numbers.csv": b"old"}
    link = tmp_path / "link.csv"
    link.symlink_to(target)
    with atomic_file(link) as path:
        path.write_text("new")
    assert link.is_symlink() and target.read_text() == "new"
    with atomic_file(Path("/dev/null")) as path:
        assert path == Path("/dev/null")
    with pytest.raises(OutputError, match=r"missing.*No such"), atomic_file(tmp_path / "missing/x"):
        pass


def test_a_kill_loses_nothing(tmp_path: Path) -> None:
    target = save_adapter(tmp_path / "out")
    before = files(target)
    program = (
        "import sys, time; from pathlib import Path\n"
        "from lora_merge.files.atomic import atomic_directory\n"
        f"with atomic_directory(Path({str(target)!r})) as folder:\n"
        "    (folder / 'half').write_text('x'); print('ready', flush=True); time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    assert process.stdout is not None
    with process.stdout:
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(signal.SIGKILL)
        process.wait()
    time.sleep(0.05)
    assert files(target) == before


def test_leftovers_are_swept_and_living_runs_are_not(tmp_path: Path) -> None:
    target = tmp_path / "out"
    (tmp_path / ".out.dead.tmp").mkdir()
    (tmp_path / ".out.dead.tmp" / "half").write_text("x")
    (tmp_path / ".other.dead.tmp").mkdir()
    with atomic_directory(target) as first:
        (first / "file").write_text("first")
        with atomic_directory(target) as second:
            assert first.is_dir() and not (tmp_path / ".out.dead.tmp").exists()
            (second / "file").write_text("second")
        assert (target / "file").read_text() == "second"
    assert (target / "file").read_text() == "first"
    assert sorted(p.name for p in tmp_path.iterdir()) == [".other.dead.tmp", "out"]


def test_targets_are_refused_before_work(tmp_path: Path) -> None:
    source = save_adapter(tmp_path / "in")
    foreign = tmp_path / "home"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("precious")
    file = tmp_path / "file"
    file.write_text("x")
    link = tmp_path / "link"
    link.symlink_to(foreign)
    weights = source / "adapter_model.safetensors"
    for target, force, word in [
        (source, True, "holds an input"),
        (tmp_path, True, "holds an input"),
        (save_adapter(tmp_path / "old"), False, "not empty"),
        (foreign, False, "not empty"),
        (foreign, True, "holds no adapter"),
        (file, True, "no directory"),
        (file / "below", True, "no directory"),
        (link, True, "no directory"),
    ]:
        with pytest.raises(OutputError, match=word):
            check_target(target, force=force, inputs=[weights])
    with pytest.raises(OutputError, match="no space"):
        check_target(tmp_path / "new", force=False, needed=10**18)
    check_target(tmp_path / "old", force=True, inputs=[weights])
    check_target(tmp_path / "new" / "deep", force=False, inputs=[weights], needed=10)


def test_exact_patterns_name_one_module_each() -> None:
    adapters = [make_adapter("a", rank_pattern={"up_proj": 6})]
    alignment = align(adapters)
    ranks = {m.name: m.num_units for m in alignment.modules}
    plan = plan_output(adapters, alignment.modules, ranks, dtype="F32", layout="per-module")
    config = json.loads(json.dumps(dict(plan.config)))
    assert config["r"] == config["lora_alpha"] == 6
    assert config["rank_pattern"] == config["alpha_pattern"]
    assert sorted(config["rank_pattern"].values()) == [4, 4]
