"""Every form of PEFT LoRA: our reader's delta is PEFT's, and so is that of what we write."""

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import lora_merge
from lora_merge.adapters.adapter import Adapter
from lora_merge.adapters.alignment import align, read_stacks
from lora_merge.adapters.forms import ModuleSpec
from lora_merge.merge.plan import plan_merge
from lora_merge.merge.recipe.recipe import AdapterItem, Recipe
from lora_merge.merge.run import PlannedMerge


class Experts(nn.Module):
    """A mixture-of-experts block with 3-D parameters, as transformers has them."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(3, 10, 8))
        self.down_proj = nn.Parameter(torch.randn(3, 8, 5))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.einsum("bi,eoi->ebo", x, self.gate_up_proj)[..., :5]
        return torch.einsum("ebi,eoi->bo", hidden, self.down_proj)


class Block(nn.Module):
    """One of everything that a LoRA can adapt."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(30, 8)
        self.q_proj = nn.Linear(8, 12)
        self.up_proj = nn.Linear(8, 20, bias=False)
        self.conv1 = nn.Conv1d(6, 9, 3)
        self.conv2 = nn.Conv2d(4, 7, 3)
        self.point = nn.Conv2d(4, 7, 1)
        self.conv3 = nn.Conv3d(2, 5, 2)
        self.c_attn = Conv1D(24, 8)
        self.experts = Experts()
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        return self.head(self.experts(h.mean(1)) + h.mean(1))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(), Block()])

    def forward(self, x: Tensor) -> Tensor:
        return sum(layer(x) for layer in self.layers)


FORMS: dict[str, dict[str, Any]] = {
    "linear": {"target_modules": ["q_proj", "up_proj"]},
    "rslora": {"target_modules": ["q_proj"], "use_rslora": True},
    "patterns": {
        "target_modules": ["q_proj", "up_proj"],
        "rank_pattern": {"layers.0.q_proj": 2, "up_proj": 5},
        "alpha_pattern": {"q_proj": 3},
    },
    "patterns-rslora": {
        "target_modules": ["q_proj", "up_proj"],
        "rank_pattern": {"q_proj": 6},
        "use_rslora": True,
    },
    "embedding": {"target_modules": ["embed"]},
    "conv1d": {"target_modules": ["conv1"]},
    "conv2d": {"target_modules": ["conv2"]},
    "conv2d-1x1": {"target_modules": ["point"]},
    "conv3d": {"target_modules": ["conv3"]},
    "gpt2-conv1d": {"target_modules": ["c_attn"], "fan_in_fan_out": True},
    "lora-bias": {"target_modules": ["q_proj", "conv2"], "lora_bias": True},
    "bias-all": {"target_modules": ["q_proj"], "bias": "all"},
    "bias-lora-only": {"target_modules": ["q_proj"], "bias": "lora_only"},
    "modules-to-save": {"target_modules": ["q_proj"], "modules_to_save": ["head"]},
    "experts": {
        "target_modules": [],
        "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
    },
    "one-expert-parameter": {
        "target_modules": ["q_proj"],
        "target_parameters": ["experts.down_proj"],
    },
    "regex": {"target_modules": r".*0\.q_proj"},
    "some-layers": {
        "target_modules": ["q_proj"],
        "layers_to_transform": [1],
        "layers_pattern": "layers",
    },
}


def train(form: str, seed: int, r: int = 4, alpha: int = 6) -> peft.PeftModel:
    """A PEFT model of a form with random, non-zero factors (and biases)."""
    torch.manual_seed(0)
    model = Model()
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.LoraConfig(r=r, lora_alpha=alpha, **copy.deepcopy(FORMS[form]))
        wrapped = peft.get_peft_model(model, config)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name or parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    return wrapped


def save(model: peft.PeftModel, folder: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder, save_embedding_layers=False)
    return folder


def load(folder: Path) -> peft.PeftModel:
    """Load a written adapter; PEFT may not warn of missing or unexpected keys."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", message=".*(missing|unexpected).*")
        return peft.PeftModel.from_pretrained(Model(), folder)


def peft_deltas(model: peft.PeftModel) -> dict[str, Tensor]:
    """Path of the module, or of the parameter that PEFT wraps → delta weight."""
    return {
        canonical_name(name, module): module.get_delta_weight("default").detach()
        for name, module in model.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer) and module.r
    }


def canonical_name(name: str, layer: nn.Module) -> str:
    name = name.removeprefix("base_model.model.")
    parameter = getattr(layer, "parameter_name", None)
    return name if parameter is None else f"{name.replace('.base_layer', '')}.{parameter}"


def as_weight(spec: ModuleSpec, deltas: list[Tensor], like: Tensor) -> Tensor:
    """Our factor products in the shape of the base weight."""
    if spec.form == "experts":
        stacked = torch.stack(deltas)
        return stacked if stacked.shape == like.shape else stacked.mT
    if spec.form == "embedding":
        return deltas[0].T
    if deltas[0].shape != like.shape and deltas[0].dim() == like.dim():
        return deltas[0].T
    return deltas[0].reshape(like.shape)


def our_deltas(adapter: Adapter, theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    alignment = align([adapter])
    return {
        module.name: as_weight(
            module.first,
            [stack.delta() for stack in read_stacks(alignment, module)],
            theirs[module.name],
        )
        for module in alignment.modules
    }


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, delta in theirs.items():
        torch.testing.assert_close(ours[name], delta, rtol=1e-5, atol=1e-6)


def write(adapters: list[Adapter], out: Path, rank: int, layout: Any = "uniform") -> Path:
    items = tuple(AdapterItem(adapter.name) for adapter in adapters)
    recipe = Recipe("lego", items, rank, {"reweight_output": "sum"}, ranks=layout)
    PlannedMerge(plan_merge(recipe, adapters)).run(out)
    return out


@pytest.mark.parametrize("form", FORMS)
def test_our_delta_is_pefts(form: str, tmp_path: Path) -> None:
    model = train(form, seed=1)
    adapter = Adapter.from_pretrained(save(model, tmp_path / "a"))
    theirs = peft_deltas(model)
    assert_same(our_deltas(adapter, theirs), theirs)


@pytest.mark.parametrize("layout", ["uniform", "per-module"])
@pytest.mark.parametrize("form", FORMS)
def test_one_adapter_merged_alone_is_itself(form: str, layout: str, tmp_path: Path) -> None:
    model = train(form, seed=1)
    adapter = Adapter.from_pretrained(save(model, tmp_path / "a"))
    rank = max(adapter.ranks())
    again = load(write([adapter], tmp_path / "b", rank, layout=layout))
    assert_same(peft_deltas(again), peft_deltas(model))
    x = torch.arange(12).reshape(2, 6)
    torch.testing.assert_close(again.eval()(x), model.eval()(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", ["linear", "patterns", "embedding", "conv2d", "experts"])
def test_the_exact_sum_loads_as_the_sum_of_deltas(form: str, tmp_path: Path) -> None:
    models = [train(form, seed=1, r=4), train(form, seed=2, r=4, alpha=2)]
    adapters = [
        Adapter.from_pretrained(save(model, tmp_path / str(i))) for i, model in enumerate(models)
    ]
    rank = max(m.num_units for m in align(adapters).modules)
    merged = peft_deltas(load(write(adapters, tmp_path / "sum", rank)))
    first, second = map(peft_deltas, models)
    assert_same(merged, {name: first[name] + second[name] for name in first})


@pytest.mark.parametrize("form", ["bias-all", "modules-to-save", "lora-bias"])
def test_what_is_not_low_rank_follows_the_policy(form: str, tmp_path: Path) -> None:
    models = [train(form, seed=seed) for seed in (1, 2)]
    adapters = [
        Adapter.from_pretrained(save(model, tmp_path / str(i))) for i, model in enumerate(models)
    ]
    state = load(write(adapters, tmp_path / "merged", 8)).state_dict()
    states = [model.state_dict() for model in models]
    watched = {
        "bias-all": ("layers.0.conv1.bias", lambda a, b: (a + b) / 2),
        "modules-to-save": (
            "layers.0.head.modules_to_save.default.weight",
            lambda a, b: (a + b) / 2,
        ),
        "lora-bias": (
            "layers.0.q_proj.lora_B.default.bias",
            lambda a, b: (a + b) * 6 / 4,  # scaling 6/4 each; the merged scaling is 1
        ),
    }
    name, combine = watched[form]
    key = f"base_model.model.{name}"
    torch.testing.assert_close(state[key], combine(*(s[key] for s in states)))


def test_a_model_saved_inside_another_wrapper_is_unwrapped(tmp_path: Path) -> None:
    model = train("linear", seed=1)
    folder = save(model, tmp_path / "a")
    rename(folder, lambda key: "base_model.model." + key)
    adapter = Adapter.from_pretrained(folder)
    theirs = peft_deltas(model)
    assert_same(our_deltas(adapter, theirs), theirs)
    assert any("more than once" in note for note in adapter.notes)


def test_keys_with_the_adapters_name_left_in_are_read(tmp_path: Path) -> None:
    model = train("embedding", seed=1)
    folder = save(model, tmp_path / "a")
    rename(folder, lambda key: key + ".default")
    theirs = peft_deltas(model)
    assert_same(our_deltas(Adapter.from_pretrained(folder), theirs), theirs)


def test_a_pickle_is_read_when_allowed(tmp_path: Path) -> None:
    model = train("linear", seed=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(tmp_path, safe_serialization=False)
    adapter = Adapter.from_pretrained(tmp_path, allow_pickle=True)
    theirs = peft_deltas(model)
    assert_same(our_deltas(adapter, theirs), theirs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_files_merge_on_a_cpu(dtype: torch.dtype, tmp_path: Path) -> None:
    models = [train("linear", seed=seed).to(dtype) for seed in (1, 2)]
    adapters = [
        Adapter.from_pretrained(save(model, tmp_path / str(i))) for i, model in enumerate(models)
    ]
    merged = lora_merge.merge(
        adapters, method="lego", rank=8, parameters={"reweight_output": "sum"}
    )
    alignment = align([merged])
    for module in alignment.modules:
        assert module.first.dtype == {torch.float16: "F16", torch.bfloat16: "BF16"}[dtype]
        exact = sum(peft_deltas(model)[module.name].float() for model in models)
        result = next(read_stacks(alignment, module))
        assert (result.delta() - exact).norm() < 1e-2 * exact.norm()


def rename(folder: Path, change: Callable[[str], str]) -> None:
    from safetensors.torch import load_file, save_file

    path = folder / "adapter_model.safetensors"
    save_file({change(k): v for k, v in load_file(path).items()}, path)
