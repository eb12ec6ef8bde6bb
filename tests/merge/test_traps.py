"""Known faults of other tools, each met here with the right result (issues in brackets).

PEFT is the oracle for what one adapter is (`get_delta_weight`), and for what its own combinations
do where these are right; sums and rules on whole deltas are the oracle for the rest.
"""

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from dense import total, truncated
from peft.utils import merge_utils as peft_rules
from torch import Tensor, nn

import lora_merge
from builders import adapter_parts, save_parts
from lora_merge.adapters.adapter import Adapter
from lora_merge.adapters.alignment import align, read_stacks

WEIGHTS = (0.7, -0.4)
NAMES = ("one", "two")
# What the two adapters' configs say besides targets; r 4 and alpha 6 where they say nothing.
QUIRKS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "alpha is not r [peft 3111]": ({}, {"lora_alpha": 3}),
    "rsLoRA [peft 3449, 3761]": ({"use_rslora": True}, {"use_rslora": True}),
    "rsLoRA and not [peft 3473]": ({"use_rslora": True}, {}),
    "rank_pattern [peft 3737]": (
        {"rank_pattern": {"up": 2}, "alpha_pattern": {"up": 5}},
        {"rank_pattern": {"q": 3}},
    ),
    "mixed ranks": ({"r": 2}, {"r": 5}),
    "target_modules as text and list [peft 1045]": (
        {"target_modules": r".*\.(q|up)"},
        {"target_modules": ["q"]},
    ),
}


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = nn.ModuleDict({"q": nn.Linear(16, 24), "up": nn.Linear(16, 40)})

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.block["q"](x), self.block["up"](x)], dim=-1)


def trained(quirks: tuple[dict[str, Any], ...]) -> Any:
    """A PEFT model with one random adapter per mapping of config fields."""
    torch.manual_seed(0)
    common = {"r": 4, "lora_alpha": 6, "target_modules": ["q", "up"]}
    configs = [peft.LoraConfig(**{**common, **quirk}) for quirk in quirks]
    model = peft.get_peft_model(Model(), configs[0], adapter_name=NAMES[0])
    for name, config in zip(NAMES[1:], configs[1:], strict=True):
        model.add_adapter(name, config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.3)
    return model


def saved(model: Any, folder: Path) -> list[Path]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a base model that has no config
        model.save_pretrained(folder)
    return [folder / name for name in NAMES]


def deltas_in(model: Any, adapter: str) -> dict[str, Tensor]:
    layers = {
        name.removeprefix("base_model.model."): layer
        for name, layer in model.named_modules()
        if hasattr(layer, "lora_A") and adapter in getattr(layer, "lora_A", {})
    }
    return {name: layer.get_delta_weight(adapter).detach() for name, layer in layers.items()}


def deltas_of(adapter: Adapter) -> dict[str, Tensor]:
    alignment = align([adapter])
    return {m.name: next(read_stacks(alignment, m)).delta() for m in alignment.modules}


def reloaded(merged: Adapter, folder: Path) -> dict[str, Tensor]:
    """The merged deltas as PEFT sees them after a save."""
    merged.save_pretrained(folder)
    return deltas_in(peft.PeftModel.from_pretrained(Model(), str(folder)), "default")


def on_deltas(method: str, parts: list[Tensor], weights: list[float]) -> Tensor:
    if method == "ties":
        return peft_rules.ties(parts, torch.tensor(weights), 0.4)
    if method == "magnitude":
        return peft_rules.magnitude_prune(parts, torch.tensor(weights), 0.4)
    merged = total(parts, weights)
    return truncated(merged, 2) if method == "svd" else merged


@pytest.mark.parametrize("quirk", QUIRKS)
@pytest.mark.parametrize("method", ["cat", "svd", "task-arithmetic", "ties", "magnitude"])
def test_scalings_ranks_targets_and_signs(method: str, quirk: str, tmp_path: Path) -> None:
    """Every scaling once, every sign kept [peft 2796, 2811, 2918], files that load [peft 3737]."""
    model = trained(QUIRKS[quirk])
    folders = saved(model, tmp_path / "in")
    elementwise = method in ("ties", "magnitude")
    merged = lora_merge.merge(
        folders,
        method=method,
        weights=WEIGHTS,
        rank=2 if method == "svd" else "full",
        parameters={"density": 0.4, "compat": "peft"} if elementwise else {},
    )
    sources = [deltas_in(model, name) for name in NAMES]
    found = reloaded(merged, tmp_path / "out")
    assert set(found) == set(sources[0]) | set(sources[1])
    for name, delta in found.items():
        present = [(s[name], w) for s, w in zip(sources, WEIGHTS, strict=True) if name in s]
        expected = on_deltas(method, [d for d, _ in present], [w for _, w in present])
        torch.testing.assert_close(delta, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "method", "settings"),
    [
        ("linear", "linear-factors", {}),
        ("svd", "svd", {}),
        ("cat", "cat", {}),
        ("ties_svd", "ties", {"parameters": {"density": 0.4, "compat": "peft"}}),
        ("magnitude_prune_svd", "magnitude", {"parameters": {"density": 0.4, "compat": "peft"}}),
        ("ties", "ties", {"parameters": {"density": 0.4, "compat": "peft"}, "space": "factors"}),
        (
            "magnitude_prune",
            "magnitude",
            {"parameters": {"density": 0.4, "compat": "peft"}, "space": "factors"},
        ),
    ],
)
@pytest.mark.parametrize("weights", [(0.7, 0.4), WEIGHTS], ids=["positive", "mixed signs"])
def test_compat_peft_is_what_peft_combines(
    kind: str, method: str, settings: dict[str, Any], weights: tuple[float, ...], tmp_path: Path
) -> None:
    model = trained(({}, {"lora_alpha": 3}))
    options = {"density": 0.4} if "ties" in kind or "magnitude" in kind else {}
    options |= {"svd_rank": 4} if "svd" in kind else {}
    model.add_weighted_adapter(list(NAMES), list(weights), "merged", kind, **options)
    theirs = deltas_in(model, "merged")
    folders = saved(model, tmp_path / "in")
    rank = "full" if kind == "cat" else 4
    merged = lora_merge.merge(folders, method=method, weights=weights, rank=rank, **settings)
    for name, delta in deltas_of(merged).items():
        torch.testing.assert_close(delta, theirs[name], rtol=1e-3, atol=1e-4)


def test_merging_leaves_the_configs_alone(tmp_path: Path) -> None:
    """[peft 654] PEFT once wrote the merged alpha into the first adapter's config."""
    folders = saved(trained(({}, {"lora_alpha": 3})), tmp_path)
    before = [(f / "adapter_config.json").read_bytes() for f in folders]
    lora_merge.merge(folders, method="svd").save_pretrained(tmp_path / "out")
    assert [(f / "adapter_config.json").read_bytes() for f in folders] == before


def test_two_to_one_is_ten_to_five_where_asked(tmp_path: Path) -> None:
    """[peft 1555] Weights are shares with normalize, factors without."""
    folders = saved(trained(({}, {})), tmp_path)
    merged = {
        weights: deltas_of(
            lora_merge.merge(folders, method="svd", weights=weights, normalize="sum")
        )
        for weights in ((2.0, 1.0), (10.0, 5.0))
    }
    for name, delta in merged[2.0, 1.0].items():
        torch.testing.assert_close(merged[10.0, 5.0][name], delta)


@pytest.mark.parametrize("ratio", [0.0, 0.25, 1.0])
def test_ratios_are_linear(ratio: float, tmp_path: Path) -> None:
    """[sd-scripts 868] Ratio squared, and a trace of what had ratio 0."""
    model = trained(({}, {"r": 2}))
    folders = saved(model, tmp_path)
    merged = lora_merge.merge(folders, method="cat", weights=(1 - ratio, ratio))
    for name, delta in deltas_of(merged).items():
        one, two = (deltas_in(model, adapter)[name] for adapter in NAMES)
        torch.testing.assert_close(delta, (1 - ratio) * one + ratio * two)


def test_the_bias_of_b_is_merged_with_its_scaling(tmp_path: Path) -> None:
    """[peft 3761] `lora_bias` is part of what an adapter does."""
    folders = []
    biases = []
    for index, alpha in enumerate((8, 2)):
        shapes = {"block.q": (24, 16)}
        config, tensors = adapter_parts(
            r=4, alpha=alpha, seed=index, shapes=shapes, lora_bias=True, task_type=None
        )
        bias = torch.randn(24, generator=torch.Generator().manual_seed(index))
        tensors["base_model.model.block.q.lora_B.bias"] = bias
        biases.append(alpha / 4 * bias)
        folders.append(save_parts(tmp_path / str(index), config, tensors))
    merged = lora_merge.merge(folders, method="cat", weights=WEIGHTS)
    merged.save_pretrained(tmp_path / "out")
    loaded = peft.PeftModel.from_pretrained(Model(), str(tmp_path / "out"))
    layer = loaded.get_submodule("base_model.model.block.q")
    found = layer.lora_B["default"].bias * layer.scaling["default"]
    torch.testing.assert_close(found.detach(), total(biases, WEIGHTS))
