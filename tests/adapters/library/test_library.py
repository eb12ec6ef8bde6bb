"""A library holds what was packed, byte by byte, whoever adds to it, moves it or damages it."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import lora_merge
from builders import SHAPES, adapter_parts, save_adapter, save_parts
from lora_merge.adapters.adapter import Adapter
from lora_merge.adapters.library import pack as packing
from lora_merge.adapters.library.index import open_library
from lora_merge.errors import LoraMergeError

MODULE = next(iter(SHAPES))


def adapters(folder: Path, count: int = 3, **parts: Any) -> list[str]:
    return [str(save_adapter(folder / f"a{i}", seed=i, **parts)) for i in range(count)]


def same_adapter(one: Adapter, other: Adapter) -> None:
    assert (one.config, one.modules, one.extras) == (other.config, other.modules, other.extras)
    assert one.tensors.entries() == other.tensors.entries()
    assert one.tensors.metadata() == other.tensors.metadata()
    for name in one.tensors.entries():
        mine, theirs = one.tensors.read(name), other.tensors.read(name)
        assert mine.dtype == theirs.dtype and torch.equal(mine, theirs)


def same_files(adapter: Adapter, folder: Path, scratch: Path) -> None:
    """What was packed can be written out again as it was."""
    scratch.mkdir()
    assert adapter.source is not None
    adapter.source.write(scratch)
    for path in scratch.iterdir():
        assert path.read_bytes() == (folder / path.name).read_bytes()


def plain(folder: Path) -> Path:
    return save_adapter(folder, seed=1, r=3)


def half_with_biases(folder: Path) -> Path:
    config, tensors = adapter_parts(lora_bias=True, modules_to_save=["score"], dtype=torch.float16)
    for name in [n for n in tensors if n.endswith("lora_B.weight")]:
        tensors[name.replace("weight", "bias")] = torch.ones(len(tensors[name])).half()
    tensors["base_model.model.score.weight"] = torch.randn(3, 5).double()
    return save_parts(folder, config, tensors)


def patterns(folder: Path) -> Path:
    return save_adapter(folder, rank_pattern={"q_proj": 2}, alpha_pattern={"up_proj": 3})


def kohya(folder: Path) -> Path:
    folder.mkdir()
    tensors = {
        "lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight": torch.randn(4, 16),
        "lora_unet_down_blocks_0_attentions_0_proj_in.lora_up.weight": torch.randn(24, 4),
        "lora_unet_down_blocks_0_attentions_0_proj_in.alpha": torch.tensor(2.0),
    }
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"ss_network_dim": "4"})
    return folder


@pytest.mark.parametrize("make", [plain, half_with_biases, patterns, kohya])
def test_what_is_packed_is_the_adapter(make: Callable[[Path], Path], tmp_path: Path) -> None:
    folder = make(tmp_path / "one")
    lora_merge.pack([folder, str(folder)], tmp_path / "lib", names=["x", "y/z"])
    before = lora_merge.open_adapter(folder)
    for number, name in enumerate(("x", "y/z")):
        opened = lora_merge.open_adapter(f"{tmp_path / 'lib'}:{name}")
        same_adapter(opened, before)
        same_files(opened, folder, tmp_path / f"written-{number}")
    assert lora_merge.check_library(tmp_path / "lib") == []


@settings(max_examples=15)
@given(
    ranks=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    parts=st.lists(st.sampled_from(sorted(SHAPES)), min_size=1, max_size=4, unique=True),
    steps=st.integers(1, 3),
)
def test_packing_in_any_steps_is_packing(
    ranks: list[int], parts: list[str], steps: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    tmp = tmp_path_factory.mktemp("law")
    folders = [
        save_adapter(
            tmp / f"a{i}", seed=i, r=r, shapes={n: SHAPES[n] for n in parts[: i % len(parts) + 1]}
        )
        for i, r in enumerate(ranks)
    ]
    for start in range(0, len(folders), steps):
        several = folders[start : start + steps]
        names = [f.name for f in several]
        lora_merge.pack(several, tmp / "lib", names=names, append=start > 0)
    lora_merge.pack(str(tmp / "lib"), tmp / "again")  # one segment of all
    for library in ("lib", "again"):
        opened = lora_merge.open_adapters(str(tmp / library))
        assert [a.name for a in opened] == [f"{tmp / library}:{f.name}" for f in folders]
        for adapter, folder in zip(opened, folders, strict=True):
            same_adapter(adapter, lora_merge.open_adapter(folder))
        assert lora_merge.check_library(tmp / library) == []


@pytest.mark.parametrize("method", ["ties", "svd", "lego-refit", "dare"])
def test_a_merge_from_a_library_has_the_same_bytes(method: str, tmp_path: Path) -> None:
    refs = adapters(tmp_path, modules_to_save=None)
    lora_merge.pack(refs, tmp_path / "lib")
    for name, given_refs in (("files", refs), ("library", [str(tmp_path / "lib")])):
        recipe = {"merge_method": method, "rank": 3, "adapters": given_refs}
        lora_merge.run_recipe(recipe, tmp_path / name)
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "files" / file).read_bytes() == (
            tmp_path / "library" / file
        ).read_bytes()
    again = lora_merge.run_recipe(tmp_path / "library" / "lora_merge.yaml", tmp_path / "again")
    assert (
        again.report.total()
        and (tmp_path / "again" / "lora_merge.yaml").read_bytes()
        == (tmp_path / "library" / "lora_merge.yaml").read_bytes()
    )
    # Its SHA-256 stands in the recipe: another adapter of that name is another adapter.
    shutil.rmtree(tmp_path / "lib")
    lora_merge.pack([*refs[:2], save_adapter(tmp_path / "new" / "a2", seed=9)], tmp_path / "lib")
    with pytest.raises(LoraMergeError):
        lora_merge.run_recipe(tmp_path / "library" / "lora_merge.yaml", tmp_path / "third")


def test_tags_and_names_choose(tmp_path: Path) -> None:
    refs, lib = adapters(tmp_path, 4), tmp_path / "lib"
    lora_merge.pack(refs[:2], lib, tags={"task": "math", "lang": "de"})
    lora_merge.pack(refs[2:], lib, tags=["task=code", "lang=de"], append=True)

    def names(ref: str) -> list[str]:
        return [a.name.rpartition(":")[2] for a in lora_merge.open_adapters(f"{lib}{ref}")]

    assert names("") == names("/") == names("[lang=de]") == ["a0", "a1", "a2", "a3"]
    assert names("[task=math]") == ["a0", "a1"]
    assert names("[task=code, lang=de]") == ["a2", "a3"]
    assert names(":a3") == ["a3"]
    for ref, said in {
        "[task=law]": r"no adapter of this library has these tags\n.*lang=de, task=code, task=math",
        "[task]": "no file matches",
        ":a00": r"the library holds no a00\n.*did you mean .*lib:a",
    }.items():
        with pytest.raises(LoraMergeError, match=said):
            lora_merge.open_adapters(f"{lib}{ref}")


def test_what_cannot_be_packed_is_refused_and_nothing_changes(tmp_path: Path) -> None:
    refs, lib = adapters(tmp_path, 2), tmp_path / "lib"
    torch.save({}, tmp_path / "x.bin")
    cases: list[tuple[Any, dict[str, Any], str]] = [
        (refs, {"names": ["x"]}, "1 names for 2 adapters"),
        (refs, {"names": ["x", "x"]}, "would both be x"),
        (refs, {"names": ["x", "a:b"]}, "is no name in a library"),
        (refs, {"tags": ["task"]}, "is no tag"),
        (refs, {"append": True}, "is no library to add to"),
        ([lora_merge.merge(refs, method="svd", rank=2)], {"names": ["m"]}, "no safetensors file"),
    ]
    for given_refs, how, said in cases:
        with pytest.raises(LoraMergeError, match=said):
            lora_merge.pack(given_refs, lib, **how)
        assert not lib.exists()
    lora_merge.pack(refs, lib)
    before = {p: p.read_bytes() for p in lib.rglob("*") if p.is_file()}
    for how, said in (({"append": True}, "holds an adapter a0 already"), ({}, "not empty")):
        with pytest.raises(LoraMergeError, match=said):
            lora_merge.pack(refs, lib, **how)
        assert {p: p.read_bytes() for p in lib.rglob("*") if p.is_file()} == before


def test_readers_see_a_library_as_it_was_when_they_opened_it(tmp_path: Path) -> None:
    refs, lib = adapters(tmp_path, 3), tmp_path / "lib"
    lora_merge.pack(refs[:2], lib)
    reader = lora_merge.open_adapters(str(lib))
    lora_merge.pack(refs[2:], lib, names=["a2"], append=True)
    assert len(lora_merge.open_adapters(str(lib))) == 3
    for adapter, ref in zip(reader, refs, strict=False):
        same_adapter(adapter, lora_merge.open_adapter(ref))
    lib.rename(tmp_path / "moved")
    same_adapter(
        lora_merge.open_adapter(f"{tmp_path / 'moved'}:a2"), lora_merge.open_adapter(refs[2])
    )
    with pytest.raises(LoraMergeError, match=r"lib:a0"):
        reader[0].read(MODULE)
    assert lora_merge.check_library(tmp_path / "moved") == []


def test_adding_that_is_cut_short_leaves_the_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refs, lib = adapters(tmp_path, 3), tmp_path / "lib"
    lora_merge.pack(refs[:1], lib, names=["a0"])
    with monkeypatch.context() as broken:
        broken.setattr(packing, "_write_index", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            lora_merge.pack(refs[1:], lib, append=True)
    assert [a.name.rpartition(":")[2] for a in lora_merge.open_adapters(str(lib))] == ["a0"]
    lora_merge.pack(refs[2:], lib, names=["a2"], append=True)  # takes away what was left
    assert lora_merge.check_library(lib) == []
    assert list(open_library(lib).adapters) == ["a0", "a2"]
    lora_merge.pack(refs, lib, force=True)  # every entry is listed as ours
    assert list(open_library(lib).adapters) == ["a0", "a1", "a2"]


@pytest.mark.parametrize("what", ["nan", "inf", "a bias of inf"])
def test_an_adapter_that_diverged_is_not_packed(what: str, tmp_path: Path) -> None:
    refs, lib = adapters(tmp_path, 2), tmp_path / "lib"
    config, tensors = adapter_parts(modules_to_save=["score"], dtype=torch.float16)
    tensors["base_model.model.score.weight"] = torch.randn(3, 5, dtype=torch.bfloat16)
    name = "base_model.model.score.weight"
    if what != "a bias of inf":
        name = next(n for n in tensors if n.endswith(f"{MODULE}.lora_B.weight"))
    tensors[name].view(-1)[-1] = float("nan" if what == "nan" else "inf")
    bad = save_parts(tmp_path / "bad", config, tensors)
    place = MODULE if MODULE in name else "no module"
    said = rf"bad: {place}: {name} has 1 NaN or infinite entries"
    with pytest.raises(LoraMergeError, match=said):
        lora_merge.pack([*refs, bad], lib)
    assert not lib.exists()
    lora_merge.pack(refs, lib)
    before = {p: p.read_bytes() for p in lib.rglob("*") if p.is_file()}
    with pytest.raises(LoraMergeError, match=said):
        lora_merge.pack(bad, lib, append=True)
    assert {p: p.read_bytes() for p in lib.rglob("*") if p.is_file()} == before
    assert sorted(p.name for p in (lib / "columns").iterdir()) == ["0001"]


def test_an_error_at_the_stamp_takes_back_what_was_added(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refs, lib = adapters(tmp_path, 2), tmp_path / "lib"
    lora_merge.pack(refs[:1], lib, names=["a0"])
    before = {p: p.read_bytes() for p in lib.rglob("*") if p.is_file()}
    with monkeypatch.context() as full:
        full.setattr(packing, "list_more", lambda *_, **__: (_ for _ in ()).throw(OSError(28, "")))
        with pytest.raises(LoraMergeError, match="free space"):
            lora_merge.pack(refs[1:], lib, append=True)
    assert {p: p.read_bytes() for p in lib.rglob("*") if p.is_file()} == before
    with monkeypatch.context() as killed:  # at the same place: nothing is taken back any more
        killed.setattr(packing, "list_more", lambda *_, **__: None)
        lora_merge.pack(refs[1:], lib, names=["a1"], append=True)
    assert lora_merge.check_library(lib)
    lora_merge.pack(refs[:1], lib, names=["more"], append=True)
    assert lora_merge.check_library(lib) == []


def test_damage_is_found_and_named(tmp_path: Path) -> None:
    refs, lib = adapters(tmp_path, 2), tmp_path / "lib"
    lora_merge.pack(refs, lib)
    column = sorted(lib.rglob("*.safetensors"))[0]
    whole = column.read_bytes()
    column.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    faults = lora_merge.check_library(lib)
    assert any("a1 is not what was packed" in fault for fault in faults)
    assert not any("a0" in fault for fault in faults)
    column.write_bytes(whole[:-9])
    assert any(fault.startswith("a0: ") for fault in lora_merge.check_library(lib))
    with pytest.raises(LoraMergeError, match=r"lib:a\d"):
        for adapter in lora_merge.open_adapters(str(lib)):
            for name in adapter.modules:
                adapter.read(name)
    column.write_bytes(whole)
    assert not any("a1" in fault for fault in lora_merge.check_library(lib))
    index = json.loads((lib / "library.json").read_text())
    for change in (
        {"adapters": [{**index["adapters"][0], "segment": "../../etc"}]},
        {"adapters": [{**index["adapters"][0], "layout": 7}]},
        {"layouts": [{**index["layouts"][0], "header": "{"}]},
        {"lora_merge_library": 2},
    ):
        (lib / "library.json").write_text(json.dumps({**index, **change}))
        with pytest.raises(LoraMergeError, match="no index of a library"):
            lora_merge.open_adapters(str(lib))


LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
from lora_merge.cli.app import run
source, lib, out = sys.argv[1:]
code = run(["pack", source, "-o", lib]) or run(
    ["merge", lib, "-M", "svd", "--rank", "3", "--scale", "1", "-o", out])
sys.exit(code)
"""


@pytest.mark.parametrize("count, modules", [(1000, 1), (2, 300)])
def test_256_open_files_are_enough(count: int, modules: int, tmp_path: Path) -> None:
    shapes = {f"model.layers.{i}.mlp.up_proj": (4, 3) for i in range(modules)}
    for number in range(count):
        save_adapter(tmp_path / "in" / f"{number:04}", r=2, seed=number, shapes=shapes)
    arguments = [str(tmp_path / "in" / "*"), str(tmp_path / "lib"), str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, *arguments], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "lib").rglob("*.safetensors"))) == modules
    assert Adapter.from_pretrained(tmp_path / "out").modules
