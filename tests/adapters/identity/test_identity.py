"""One module under several names: one module where that is certain, a refusal where it is not."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from builders import adapter_parts, delta, make_adapter, save_adapter
from lora_merge.adapters.access.coerce import open_adapters
from lora_merge.adapters.adapter import Adapter
from lora_merge.adapters.alignment import align
from lora_merge.adapters.identity.rename import parse_renames, rename_all
from lora_merge.cli.app import run
from lora_merge.errors import AdapterError, AlignmentError

NEW, OLD, TEXT, BARE = "model.language_model.", "language_model.model.", "model.", ""
# Every pair of prefixes that one base model is known under, but for the certain pair.
DOUBTFUL = [(NEW, TEXT), (OLD, TEXT), (TEXT, BARE), (NEW, BARE), ("model.text_model.", TEXT)]


def shapes(prefix: str, leaf: str = "self_attn.q_proj") -> Mapping[str, tuple[int, int]]:
    return {f"{prefix}layers.{layer}.{leaf}": (24, 16) for layer in range(2)}


def under(prefix: str, seed: int, **parts: Any) -> Adapter:
    return make_adapter(
        f"at {prefix or 'nothing'}", seed=seed, **{"shapes": shapes(prefix), **parts}
    )


def test_names_before_and_after_transformers_4_52_are_one() -> None:
    aligned = align([under(OLD, 1), under(NEW, 2)])
    assert [m.name for m in aligned.modules] == list(shapes(NEW))
    assert all(len(m.specs) == 2 for m in aligned.modules)
    before = under(OLD, 1)
    for old, new in zip(shapes(OLD), shapes(NEW), strict=True):
        assert torch.equal(delta(aligned.adapters[0], new), delta(before, old))


def test_adapters_that_agree_keep_their_names() -> None:
    assert [m.name for m in align([under(OLD, 1), under(OLD, 2)]).modules] == list(shapes(OLD))


def test_the_head_moves_with_the_layers() -> None:
    head = {**shapes(OLD), "language_model.lm_head": (30, 16)}
    aligned = align([under(OLD, 1, shapes=head), under(NEW, 2)])
    assert "lm_head" in [m.name for m in aligned.modules]


@pytest.mark.parametrize("pair", [*DOUBTFUL, *(pair[::-1] for pair in DOUBTFUL)])
@pytest.mark.parametrize("leaf", ["self_attn.q_proj", "mlp.up_proj"])
def test_names_that_may_be_one_are_refused_and_the_remedy_works(
    pair: tuple[str, str], leaf: str
) -> None:
    """Also where the two have no module in common: the union loads in no class of the model."""
    adapters = [under(pair[0], 1), under(pair[1], 2, shapes=shapes(pair[1], leaf))]
    with pytest.raises(AlignmentError, match="may be one") as caught:
        align(adapters)
    for adapter in adapters:
        assert adapter.name in str(caught.value)
    rename = caught.value.remedy.partition("--rename ")[2].split()[0]
    fitting = align(rename_all(adapters, [rename]))
    assert len({m.name.partition("layers.")[0] for m in fitting.modules}) == 1


def test_stacks_that_are_surely_two_stay_two() -> None:
    both = {**shapes("text_model.encoder."), **shapes("vision_model.encoder.")}
    align([under("", 1, shapes=both), under("", 2, shapes=shapes("text_model.encoder."))])
    align([under("encoder.", 1), under("decoder.", 2)])
    # Another width: an image model's layers beside a text model's.
    wide = dict.fromkeys(shapes("visual."), (48, 32))
    align([under("visual.", 1, shapes=wide), under("", 2)])
    # One adapter has both, so they are two.
    align([under("", 1, shapes={**shapes(""), **shapes("decoder.")}), under("", 2)])


def test_renaming_keeps_every_tensor() -> None:
    config, tensors = adapter_parts(modules_to_save=["norm"], shapes=shapes(TEXT))
    from lora_merge.adapters.adapter import build_adapter
    from lora_merge.adapters.config import parse_config
    from lora_merge.files.tensor_file import TensorDict

    tensors["base_model.model.model.norm.weight"] = torch.ones(16)
    adapter = build_adapter("a", parse_config(config, "a"), TensorDict(tensors))
    (changed,) = rename_all([adapter], ["model=model.language_model"])
    assert list(changed.extras) == ["model.language_model.norm.weight"]
    for old, new in zip(shapes(TEXT), shapes(NEW), strict=True):
        assert torch.equal(delta(adapter, old), delta(changed, new))
    assert torch.equal(changed.read_extra("model.language_model.norm.weight"), torch.ones(16))


@pytest.mark.parametrize(
    ("rename", "word"),
    [
        ("layers", "no FROM=TO"),
        ("=x", "no FROM=TO"),
        ("nowhere=x", "no adapter has a module below"),
    ],
)
def test_renames_that_mean_nothing_are_refused(rename: str, word: str) -> None:
    with pytest.raises(AdapterError, match=word) as caught:
        rename_all([under(TEXT, 1)], [rename])
    assert caught.value.remedy


def test_a_rename_that_makes_one_of_two_is_refused() -> None:
    both = under("", 1, shapes={**shapes(TEXT), **shapes(BARE)})
    with pytest.raises(AdapterError, match="one name"):
        rename_all([both], ["layers=model.layers"])
    assert str(parse_renames([" a.b. = c "])[0]) == "a.b=c"


def test_the_command_line_renames(tmp_path: Path) -> None:
    for name, prefix in (("causal", TEXT), ("bare", BARE)):
        save_adapter(tmp_path / name, shapes=shapes(prefix), seed=len(name))
    refs = [str(tmp_path / "causal"), str(tmp_path / "bare")]
    merge = ["merge", *refs, "-M", "cat", "-o", str(tmp_path / "m")]
    assert run(merge) == 1
    assert not (tmp_path / "m").exists()
    assert run([*merge, "--rename", "layers=model.layers"]) == 0
    merged = Adapter.from_pretrained(tmp_path / "m")
    one, other = open_adapters(refs, rename=["layers=model.layers"])
    for name in shapes(TEXT):
        torch.testing.assert_close(delta(merged, name), delta(one, name) + delta(other, name))
    assert run(["run", str(tmp_path / "m" / "lora_merge.yaml"), "-o", str(tmp_path / "n")]) == 0
    weights = "adapter_model.safetensors"
    assert (tmp_path / "m" / weights).read_bytes() == (tmp_path / "n" / weights).read_bytes()


def test_a_base_checks_names_and_shapes(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    folder = save_adapter(tmp_path / "a", shapes=shapes(TEXT))
    bases = {
        "good": (TEXT, (24, 16)),
        "turned": (TEXT, (16, 24)),
        "wide": (TEXT, (24, 17)),
        "other": ("encoder.", (24, 16)),
    }
    for name, (prefix, size) in bases.items():
        (tmp_path / name).mkdir()
        tensors = {f"{module}.weight": torch.zeros(size) for module in shapes(prefix)}
        save_file(tensors, tmp_path / name / "model.safetensors")
    for fits in ("good", "turned"):
        Adapter.from_pretrained(folder, base=tmp_path / fits)
    with pytest.raises(AdapterError, match=r"changes a 24 x 16 weight, the base's is \[24, 17\]"):
        Adapter.from_pretrained(folder, base=tmp_path / "wide")
    with pytest.raises(AdapterError, match=r"the base has no weight for model\.layers\.0"):
        Adapter.from_pretrained(folder, base=tmp_path / "other")
