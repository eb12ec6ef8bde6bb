"""Opening adapters: lazily, and with errors that name file, module and remedy."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from builders import adapter_parts, make_adapter, save_adapter, save_parts
from lora_merge.adapters.adapter import Adapter, build_adapter
from lora_merge.adapters.alignment import align, read_stacks
from lora_merge.adapters.config import parse_config
from lora_merge.adapters.references import expand, resolve
from lora_merge.errors import AdapterError, AlignmentError, SourceError
from lora_merge.files.tensor_file import SafetensorsFile, TensorDict

Q = "model.layers.0.self_attn.q_proj"
KEY = f"base_model.model.{Q}.lora_"


def test_opening_reads_no_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_adapter(tmp_path)

    def refuse(self: SafetensorsFile, name: str) -> torch.Tensor:
        raise AssertionError(name)

    monkeypatch.setattr(SafetensorsFile, "read", refuse)
    adapter = Adapter.from_pretrained(tmp_path)
    assert adapter.ranks() == {4: 4}
    assert adapter.num_parameters == 4 * (24 + 16 + 40 + 16) * 2
    assert adapter.config.base_model == "tiny-base"


def test_a_bare_file_takes_the_config_beside_it(tmp_path: Path) -> None:
    save_adapter(tmp_path, alpha=12)
    adapter = Adapter.from_pretrained(tmp_path / "adapter_model.safetensors")
    assert adapter.modules[Q].scaling == 3


def test_a_directory_with_one_oddly_named_file_is_enough(tmp_path: Path) -> None:
    save_adapter(tmp_path)
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "mine.safetensors")
    assert Adapter.from_pretrained(tmp_path).modules


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(KEY + "B.weight"), [Q, "lora_A but no lora_B"]),
        (lambda t: t.pop(KEY + "A.weight"), [Q, "lora_B but no lora_A"]),
        (lambda t: t.update({KEY + "A.weight": torch.zeros(5, 16)}), [Q, "rank 5", "says 4"]),
        (lambda t: t.update({KEY + "B.weight": torch.zeros(24, 5)}), [Q, "do not belong"]),
        (lambda t: t.update({KEY + "A.weight": torch.zeros(0, 16)}), [Q, "empty"]),
        (lambda t: t.update({KEY + "A.weight": torch.zeros(64)}), [Q, "flat"]),
        (lambda t: t.update({KEY + "A.weight": torch.zeros(4, 16).long()}), ["I64"]),
        (lambda t: t.update({KEY + "A.default.weight": torch.zeros(4, 16)}), ["both name"]),
        (lambda t: t.update({KEY + "B.bias": torch.zeros(3)}), [Q, "the bias on B", "[3]"]),
        (lambda t: t.update({KEY + "B.bias": torch.zeros(24).int()}), [Q, "the bias on B", "I32"]),
        (lambda t: t.update({"x.lora_magnitude_vector": torch.zeros(4)}), ["DoRA"]),
        (lambda t: t.update({"x.lora_down.weight": torch.zeros(4, 4)}), ["kohya"]),
        (lambda t: t.update({"lora_unet_x.hada_w1_a": torch.zeros(4, 4)}), ["LyCORIS (LoHa"]),
        (lambda t: t.update({"lora_unet_x.lokr_w2": torch.zeros(4, 4)}), ["LyCORIS (LoHa, LoKr"]),
        (lambda t: t.update({"../x.lora_A.weight": torch.zeros(4, 4)}), ["illegal"]),
        (lambda t: t.clear() or t.update(w_a_000=torch.zeros(2)), ["no LoRA module", "w_a_000"]),
    ],
)
def test_damaged_tensors_are_refused(change: Any, words: list[str], tmp_path: Path) -> None:
    config, tensors = adapter_parts()
    change(tensors)
    with pytest.raises(AdapterError) as caught:
        Adapter.from_pretrained(save_parts(tmp_path, config, tensors))
    for word in [str(tmp_path), *words]:
        assert word in str(caught.value)
    assert caught.value.remedy


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "LFS"),
        (b"{}", "2 bytes"),
        (b"", "0 bytes"),
        (b"\xff" * 100, "not a readable safetensors"),
        (b"\x10\0\0\0\0\0\0\0" + b'{"a": 1}' + b" " * 8, "not a readable safetensors"),
    ],
)
def test_files_that_are_no_weights_are_refused(content: bytes, word: str, tmp_path: Path) -> None:
    save_adapter(tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(content)
    with pytest.raises(AdapterError, match=word):
        Adapter.from_pretrained(tmp_path)


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    save_adapter(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(AdapterError, match="safetensors"):
        Adapter.from_pretrained(tmp_path)


def test_without_a_config_the_scaling_is_unknown(tmp_path: Path) -> None:
    save_adapter(tmp_path)
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(AdapterError, match="scaling is unknown") as caught:
        Adapter.from_pretrained(tmp_path)
    assert "--alpha" in caught.value.remedy


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_are_named(bad: float, tmp_path: Path) -> None:
    config, tensors = adapter_parts()
    tensors[KEY + "B.weight"][3, 1] = bad
    good = make_adapter("good")
    damaged = Adapter.from_pretrained(save_parts(tmp_path, config, tensors))
    alignment = align([good, damaged])
    module = next(m for m in alignment.modules if m.name == Q)
    with pytest.raises(AdapterError, match=r"lora_B has 1 NaN or infinite") as caught:
        list(read_stacks(alignment, module))
    assert str(tmp_path) in str(caught.value)
    assert Q in str(caught.value)


def test_biases_and_whole_tensors_that_are_not_finite_are_named() -> None:
    config, tensors = adapter_parts(lora_bias=True, modules_to_save=["norm"])
    norm = "base_model.model.model.norm.weight"
    tensors |= {KEY + "B.bias": torch.zeros(24), norm: torch.ones(16)}
    adapter = build_adapter("mine", parse_config(config, "mine"), TensorDict(tensors))
    assert torch.equal(adapter.read_bias(Q), torch.zeros(24).double())
    assert adapter.read_bias("model.layers.1.self_attn.q_proj") is None
    tensors[KEY + "B.bias"][3] = tensors[norm][0] = float("nan")
    with pytest.raises(AdapterError, match=f"mine: {Q}: the bias on B has 1 NaN"):
        adapter.read_bias(Q)
    with pytest.raises(AdapterError, match=r"mine: model.norm.weight has 1 NaN"):
        adapter.read_extra("model.norm.weight")


def test_values_whose_squares_overflow_are_refused_and_large_ones_are_not() -> None:
    adapter = make_adapter(dtype=torch.bfloat16)
    alignment = align([adapter])
    adapter.tensors.read(KEY + "A.weight").fill_(1e14)
    for module in alignment.modules:
        list(read_stacks(alignment, module))
    adapter.tensors.read(KEY + "A.weight").fill_(3e38)
    with pytest.raises(AdapterError, match=r"lora_A has entries up to 2\.99e\+38|3e\+38"):
        [list(read_stacks(alignment, module)) for module in alignment.modules]


def test_every_mismatch_is_listed_at_once() -> None:
    first = make_adapter("first")
    shapes = {"model.layers.0.self_attn.q_proj": (24, 99), "model.layers.0.mlp.up_proj": (41, 16)}
    second = make_adapter("second", shapes=shapes, base_model_name_or_path="other-base")
    with pytest.raises(AlignmentError) as caught:
        align([first, second])
    assert len(caught.value.mismatches) == 3
    for word in ("24 x 16", "24 x 99", "41 x 16", "tiny-base", "other-base", "first", "second"):
        assert word in str(caught.value)
    with pytest.raises(AlignmentError) as caught:
        align([first, second], accept_base_models=True)
    assert len(caught.value.mismatches) == 2


def test_different_ranks_scalings_dtypes_and_modules_are_normal() -> None:
    few = {"model.layers.0.self_attn.q_proj": (24, 16)}
    alignment = align(
        [
            make_adapter("a", r=2, alpha=1),
            make_adapter("b", r=5, use_rslora=True, dtype=torch.bfloat16),
            make_adapter("c", r=3, shapes=few),
        ]
    )
    units = {m.name: m.num_units for m in alignment.modules}
    assert units[Q] == 10
    assert units["model.layers.1.mlp.up_proj"] == 7
    assert align([make_adapter("d", base_model_name_or_path=None)]).base_model is None


@pytest.mark.parametrize(
    ("ref", "word"),
    [
        ("nowhere/at/all", "no such file"),
        ("./nowhere", "no such file"),
        ("user/repo:../../secret", "may not leave"),
        ("hf://datasets/user/repo", "not a model"),
        ("hf://", "hf://"),
    ],
)
def test_references_to_nothing(ref: str, word: str) -> None:
    with pytest.raises(SourceError, match=word):
        resolve(ref)


def test_local_references_that_hold_no_adapter(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"no adapter_model\.safetensors"):
        resolve(str(tmp_path))
    save_adapter(tmp_path / "checkpoint-5")
    with pytest.raises(SourceError) as caught:
        resolve(str(tmp_path))
    assert "checkpoint-5" in caught.value.remedy
    text = tmp_path / "notes.txt"
    text.write_text("x")
    with pytest.raises(SourceError, match="not an adapter directory"):
        resolve(str(text))
    (tmp_path / "adapter_model.bin").write_bytes(b"x" * 50)
    with pytest.raises(SourceError, match="pickle"):
        resolve(str(tmp_path))
    with pytest.raises(AdapterError, match="unpickled"):
        Adapter.from_pretrained(tmp_path, allow_pickle=True)


def test_patterns_expand_in_name_order(tmp_path: Path) -> None:
    for name in ("b", "a", "c"):
        save_adapter(tmp_path / name)
    pattern = str(tmp_path / "[ab]")
    assert [Path(p).name for p in expand([pattern, "user/repo"])] == ["a", "b", "repo"]
    with pytest.raises(SourceError, match="no file matches"):
        expand([str(tmp_path / "z*")])


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Hub cache with one repository at two revisions, and no network."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    repo = tmp_path / "models--user--repo"
    for commit, alpha in (("a" * 40, 8), ("b" * 40, 16)):
        save_adapter(repo / "snapshots" / commit, alpha=alpha)
        save_adapter(repo / "snapshots" / commit / "sub", alpha=2 * alpha)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("a" * 40)
    (repo / "refs" / "v2").write_text("b" * 40)
    return tmp_path


@pytest.mark.parametrize(
    ("ref", "scaling", "commit"),
    [
        ("user/repo", 2, "a"),
        ("user/repo@v2", 4, "b"),
        ("user/repo:sub", 4, "a"),
        ("user/repo@v2:sub", 8, "b"),
        ("hf://user/repo@v2", 4, "b"),
        ("hf://user/repo/sub", 4, "a"),
        ("https://huggingface.co/user/repo/tree/v2/sub", 8, "b"),
        ("user/repo@" + "b" * 40, 4, "b"),
    ],
)
def test_hub_references(hub_cache: Path, ref: str, scaling: float, commit: str) -> None:
    adapter = Adapter.from_pretrained(ref)
    assert adapter.modules[Q].scaling == scaling
    assert adapter.source is not None
    assert adapter.source.revision == commit * 40


@pytest.mark.parametrize("ref", ["user/other", "user/repo@v3", "user/repo:nothing"])
def test_what_is_not_in_the_cache_is_said_when_offline(hub_cache: Path, ref: str) -> None:
    with pytest.raises(SourceError) as caught:
        Adapter.from_pretrained(ref)
    assert ref in str(caught.value)
    assert caught.value.remedy


@pytest.mark.parametrize("alpha", [float("nan"), float("inf"), -float("inf"), 1e300])
def test_an_alpha_that_is_no_number_is_refused(alpha: float) -> None:
    for config in ({"alpha": alpha}, {"alpha_pattern": {"q_proj": alpha}}):
        with pytest.raises(AdapterError, match="no usable alpha"):
            make_adapter("mine", **config)


def test_names_and_files_that_cannot_be_read(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo" / "adapter_model.safetensors"
    fifo.parent.mkdir()
    os.mkfifo(fifo)
    (tmp_path / "link").symlink_to("nowhere")
    save_adapter(tmp_path / os.fsdecode(b"caf\xe9"))
    for ref, word in (
        (fifo.parent, "no adapter_model.safetensors"),
        (fifo, "not an adapter"),
        (tmp_path / "link", "leads nowhere"),
        (tmp_path / os.fsdecode(b"caf\xe9"), r"caf\\udce9.*not UTF-8"),
    ):
        with pytest.raises(SourceError, match=word):
            resolve(str(ref))


def test_the_real_adapters(shared: Path) -> None:
    """Public adapters open, or are refused with a reason that fits."""
    reasons = {
        "bloom-560m/merged-linear-bin": "pickle",
        "broken/lfs-pointer": "LFS",
        "broken/two-byte-file": "2 bytes",
        "sam-vit-b/rank4": "no LoRA module",
        "sam-vit-b/rank8": "no LoRA module",
    }
    for folder in sorted((shared / "adapters").glob("*/*")):
        name = f"{folder.parent.name}/{folder.name}"
        if name in reasons:
            with pytest.raises((AdapterError, SourceError), match=reasons[name]):
                Adapter.from_pretrained(folder)
        else:
            config = json.loads((folder / "adapter_config.json").read_text())
            assert set(Adapter.from_pretrained(folder).ranks()) == {config["r"]}
    with pytest.raises(AdapterError, match="MergedLinear"):
        Adapter.from_pretrained(
            shared / "adapters" / "bloom-560m" / "merged-linear-bin", allow_pickle=True
        )
