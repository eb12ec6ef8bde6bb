"""Laws of all dialects: every tensor is claimed or named, and spelling changes nothing."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from builders import adapter_parts, delta
from lora_merge.adapters.adapter import Adapter, build_adapter
from lora_merge.adapters.config import parse_config
from lora_merge.errors import AdapterError
from lora_merge.files.tensor_file import TensorDict

Parts = tuple[dict[str, Any], dict[str, Tensor]]


def plain() -> Parts:
    return adapter_parts()


def with_whole_tensors() -> Parts:
    config, tensors = adapter_parts(modules_to_save=["score"], bias="lora_only", lora_bias=True)
    stem = "base_model.model.model.layers.0.self_attn.q_proj"
    tensors |= {f"{stem}.bias": torch.zeros(24), f"{stem}.lora_B.bias": torch.ones(24)}
    tensors["base_model.model.score.weight"] = torch.ones(2, 16)
    return config, tensors


def adalora() -> Parts:
    config, tensors = adapter_parts()
    config |= {"peft_type": "ADALORA", "init_r": 6, "rank_pattern": None}
    for key in list(tensors):
        if key.endswith("lora_A.weight"):
            tensors[key.removesuffix("A.weight") + "E"] = torch.rand(4, 1)
    return config, tensors


# A dialect's row: how to make a file of it.
FILES = {"plain": plain, "whole tensors": with_whole_tensors, "adalora": adalora}
# What training code puts around a model: (before the name, between its layers).
WRAPPERS = {
    "compiled": ("_orig_mod.base_model.model.", ""),
    "compiled inside": ("base_model.model._orig_mod.", ""),
    "compiled layers": ("base_model.model.", "_orig_mod."),
    "fsdp": ("_fsdp_wrapped_module.base_model.model.", "_fsdp_wrapped_module."),
    "checkpointed": ("base_model.model.", "_checkpoint_wrapped_module."),
    "ddp": ("module.base_model.model.", ""),
    "ddp inside": ("base_model.model.module.", ""),
    "two": ("module._orig_mod.base_model.model.", ""),
    "peft twice": ("base_model.model.base_model.model.", ""),
    "none": ("", ""),
}


def opened(config: dict[str, Any], tensors: dict[str, Tensor]) -> Adapter:
    return build_adapter("mine", parse_config(config, "mine"), TensorDict(tensors))


def assert_same(one: Adapter, other: Adapter) -> None:
    assert list(one.modules) == list(other.modules)
    assert list(one.extras) == list(other.extras)
    for name in one.modules:
        assert torch.equal(delta(one, name), delta(other, name))


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("make", FILES.values(), ids=FILES.keys())
def test_wrappers_change_nothing(make: Any, wrapper: str) -> None:
    config, tensors = make()
    before, between = WRAPPERS[wrapper]

    def wrapped(key: str) -> str:
        name = key.removeprefix("base_model.model.")
        return before + name.replace("self_attn", f"{between}self_attn")

    assert_same(
        opened(config, tensors), opened(config, {wrapped(k): t for k, t in tensors.items()})
    )


@pytest.mark.parametrize("make", FILES.values(), ids=FILES.keys())
@given(data=st.data())
def test_the_order_of_tensors_changes_nothing(make: Any, data: st.DataObject) -> None:
    config, tensors = make()
    keys = data.draw(st.permutations(sorted(tensors)))
    assert_same(opened(config, tensors), opened(config, {key: tensors[key] for key in keys}))


LEAVES = st.sampled_from(
    ["m", "magnitude", "dora_scale", "lora_C.weight", "lora_diag", "lora_route.weight", "diff",
     "default_lora_latent_mapping.weight", "reshape_weight", "weight", "alpha", "hada_w1_a", "core"]
)  # fmt: skip


@pytest.mark.parametrize("make", FILES.values(), ids=FILES.keys())
@given(data=st.data(), leaf=LEAVES)
def test_every_tensor_is_claimed_or_named(make: Any, data: st.DataObject, leaf: str) -> None:
    """A tensor that nobody knows, below a module or beside it, is never averaged or lost."""
    config, tensors = make()
    stem = data.draw(st.sampled_from(sorted({key.partition(".lora_")[0] for key in tensors})))
    if "score" in stem:  # a module saved whole has any parameter
        stem = "base_model.model.elsewhere"
    key = f"{stem}.{leaf}"
    with pytest.raises(AdapterError) as caught:
        opened(config, {**tensors, key: torch.ones(3, 3)})
    assert key in str(caught.value)
    assert caught.value.remedy


@pytest.mark.parametrize("make", FILES.values(), ids=FILES.keys())
@given(data=st.data())
def test_a_tensor_under_a_new_name_is_named(make: Any, data: st.DataObject) -> None:
    config, tensors = make()
    key = data.draw(st.sampled_from(sorted(k for k in tensors if "lora_" in k)))
    renamed = {(k + "_x" if k == key else k): t for k, t in tensors.items()}
    with pytest.raises(AdapterError) as caught:
        opened(config, renamed)
    module = key.removeprefix("base_model.model.").partition(".lora_")[0]
    assert module in str(caught.value) or "several adapters" in str(caught.value)
