"""Experts as modules and as parameters, by PEFT 0.18 and 0.19, against PEFT and transformers 5."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from builders import save_parts
from lora_merge.adapters.adapter import Adapter
from lora_merge.adapters.alignment import align, read_stacks
from lora_merge.cli.app import run
from lora_merge.errors import AdapterError

EXPERTS, HIDDEN, WIDTH, RANK = 3, 16, 12, 4
BOTH = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
SHAPE = {
    "vocab_size": 40, "hidden_size": HIDDEN, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "num_experts_per_tok": 2,
}  # fmt: skip


def qwen() -> nn.Module:
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        **SHAPE, num_experts=EXPERTS, moe_intermediate_size=WIDTH, intermediate_size=20, head_dim=8
    )
    return Qwen3MoeForCausalLM(config).eval()


def mixtral() -> nn.Module:
    torch.manual_seed(0)
    config = MixtralConfig(**SHAPE, num_local_experts=EXPERTS, intermediate_size=WIDTH)
    return MixtralForCausalLM(config).eval()


MODELS: dict[str, tuple[Callable[[], nn.Module], str, tuple[str, str, str]]] = {
    "qwen": (qwen, "mlp.experts", ("gate_proj", "up_proj", "down_proj")),
    "mixtral": (mixtral, "block_sparse_moe.experts", ("w1", "w3", "w2")),
}


def apart(folder: Path, model: str, seed: int, **config: Any) -> Path:
    """An adapter as transformers 4 has it: a LoRA per expert's module."""
    random = torch.Generator().manual_seed(seed)
    _, stem, (gate, up, down) = MODELS[model]
    tensors = {}
    for expert in range(EXPERTS):
        for leaf, (rows, columns) in {
            gate: (WIDTH, HIDDEN), up: (WIDTH, HIDDEN), down: (HIDDEN, WIDTH)
        }.items():  # fmt: skip
            key = f"base_model.model.model.layers.0.{stem}.{expert}.{leaf}.lora_"
            tensors[key + "A.weight"] = torch.randn(RANK, columns, generator=random) * 0.1
            tensors[key + "B.weight"] = torch.randn(rows, RANK, generator=random) * 0.1
    said = {"peft_type": "LORA", "r": RANK, "lora_alpha": 8, "target_modules": [gate, up, down]}
    return save_parts(folder, {**said, "base_model_name_or_path": "tiny", **config}, tensors)


def together(folder: Path, seed: int, targets: list[str] = BOTH, **config: Any) -> Path:
    """An adapter as PEFT trains it under transformers 5: expert parameters."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        settings = {"r": RANK, "lora_alpha": 6, "target_modules": ["q_proj"], **config}
        model = peft.get_peft_model(qwen(), peft.LoraConfig(target_parameters=targets, **settings))
        torch.manual_seed(seed)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                nn.init.normal_(parameter, std=0.1)
        model.save_pretrained(folder)
    return folder


def in_peft(make: Callable[[], nn.Module], folder: Path) -> dict[str, Tensor]:
    """What PEFT makes of an adapter: weight → change."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = peft.PeftModel.from_pretrained(make(), str(folder)).merge_and_unload()
    before, after = make().state_dict(), loaded.state_dict()
    changes = {name: after[name].double() - before[name].double() for name in before}
    return {name: change for name, change in changes.items() if change.any()}


def ours(folder: Path, stem: str = "model.layers.0.mlp.experts.") -> dict[str, Tensor]:
    """Delta of every expert parameter, (experts, out, in)."""
    alignment = align([Adapter.from_pretrained(folder)])
    return {
        module.name: torch.stack([s.delta().double() for s in read_stacks(alignment, module)])
        for module in alignment.modules
        if module.name.startswith(stem) and module.first.form == "experts"
    }


def assert_close(some: dict[str, Tensor], others: dict[str, Tensor]) -> None:
    assert some.keys() == others.keys()
    for name, change in some.items():
        assert (change - others[name]).norm() < 1e-5 * others[name].norm(), name


def total(*changes: dict[str, Tensor]) -> dict[str, Tensor]:
    names = {name for change in changes for name in change}
    return {n: sum((c[n] for c in changes if n in c), torch.zeros(())) for n in names}


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))
    return folder


def merged(out: Path, *folders: Path, options: tuple[str, ...] = ("-M", "cat")) -> Path:
    assert run(["merge", *map(str, folders), *options, "-o", str(out), "--json"]) == 0
    return out


def test_rank_patterns_name_parameters(tmp_path: Path) -> None:
    pattern = {"mlp.experts.gate_up_proj": 2, "mlp.experts.down_proj": 1}
    folder = together(tmp_path / "a", 1, rank_pattern=pattern, alpha_pattern={BOTH[0]: 5})
    specs = Adapter.from_pretrained(folder).modules
    assert {n.rpartition(".")[2]: (s.rank, s.num_experts) for n, s in specs.items()} == {
        "gate_up_proj": (2, EXPERTS), "down_proj": (1, EXPERTS), "q_proj": (RANK, 1)
    }  # fmt: skip
    assert_close(in_peft(qwen, merged(tmp_path / "m", folder)), in_peft(qwen, folder))


def test_the_order_of_target_parameters_means_nothing(tmp_path: Path) -> None:
    one = together(tmp_path / "a", 1)
    other = edit(together(tmp_path / "b", 2), lambda c: c["target_parameters"].sort())
    edit(one, lambda c: c["target_parameters"].sort(reverse=True))
    both = in_peft(qwen, merged(tmp_path / "m", one, other))
    assert_close(both, total(in_peft(qwen, one), in_peft(qwen, other)))


@pytest.mark.parametrize("targets", [BOTH[:1], BOTH[1:]])
def test_adapters_of_different_parameters_merge(targets: list[str], tmp_path: Path) -> None:
    one, other = together(tmp_path / "a", 1), together(tmp_path / "b", 2, targets)
    both = in_peft(qwen, merged(tmp_path / "m", one, other))
    assert_close(both, total(in_peft(qwen, one), in_peft(qwen, other)))


@pytest.mark.parametrize("model", MODELS)
def test_what_peft_rewrites_for_transformers_5_is_read(model: str, tmp_path: Path) -> None:
    """PEFT loads experts' modules as parameters, and saves bare names and doubled ranks."""
    make = MODELS[model][0]
    old = apart(tmp_path / "old", model, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft.PeftModel.from_pretrained(make(), str(old)).save_pretrained(tmp_path / "new")
    assert_close(ours(tmp_path / "new"), in_peft(make, old))
    assert_close(in_peft(make, merged(tmp_path / "m", tmp_path / "new")), in_peft(make, old))


@pytest.mark.parametrize("options", [("-M", "cat"), ("-M", "cat", "--ranks", "per-module")])
def test_experts_apart_and_together_are_the_same_weights(
    options: tuple[str, ...], tmp_path: Path
) -> None:
    old, new = apart(tmp_path / "old", "qwen", 1), together(tmp_path / "new", 2)
    both = in_peft(qwen, merged(tmp_path / "m", old, new, options=options))
    assert_close(both, total(in_peft(qwen, old), in_peft(qwen, new)))


@pytest.mark.parametrize("layout", ["apart", "together"])
@pytest.mark.parametrize("uniform", [(), ("--uniform",)])
def test_resized_experts_load_in_peft(
    layout: str, uniform: tuple[str, ...], tmp_path: Path
) -> None:
    folder = apart(tmp_path / "a", "qwen", 1) if layout == "apart" else together(tmp_path / "a", 1)
    out = tmp_path / "r"
    resize = ["resize", str(folder), "--energy", "0.8", *uniform, "-o", str(out)]
    assert run([*resize, "--json"]) == 0
    before, after = in_peft(qwen, folder), in_peft(qwen, out)
    assert before.keys() == after.keys()
    square = sum(float((before[n] - after[n]).square().sum()) for n in before)
    assert 0 < square < 0.21 * sum(float(change.square().sum()) for change in before.values())


def as_peft_018(folder: Path, version: str | None = "0.18.1") -> Path:
    """The same adapter as PEFT 0.18 stores it: the last two axes taken for (in, out)."""
    from safetensors.torch import load_file, save_file

    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    for key in [k for k in tensors if "experts" in k and "lora_A" in k]:
        a, b = tensors[key], tensors[key.replace("lora_A", "lora_B")]
        deltas = torch.einsum(
            "ore,eri->eoi",
            b.reshape(b.shape[0], -1, EXPERTS),
            a.reshape(EXPERTS, -1, a.shape[1]),
        )
        u, s, v = torch.linalg.svd(deltas.mT.double())  # factors of the transposed deltas
        rank = a.shape[0] // EXPERTS
        down = s[:, :rank, None] * v[:, :rank]
        up = u[:, :, :rank].permute(1, 2, 0)
        tensors[key] = down.reshape(EXPERTS * rank, -1).float().contiguous()
        tensors[key.replace("lora_A", "lora_B")] = up.reshape(up.shape[0], -1).float().contiguous()
    save_file(tensors, path)
    return edit(folder, lambda c: c.update(peft_version=version))


@pytest.mark.parametrize("version", ["0.18.1", "0.17.0.dev0", None])
@pytest.mark.parametrize("targets", [BOTH, BOTH[:1], BOTH[1:]])
def test_experts_of_peft_before_0_19(
    targets: list[str], version: str | None, tmp_path: Path
) -> None:
    folder = together(tmp_path / "a", 1, targets)
    expected = in_peft(qwen, folder)
    old = as_peft_018(folder, version)
    assert_close(ours(old), {n: c for n, c in expected.items() if "experts" in n})
    assert_close(in_peft(qwen, merged(tmp_path / "m", old)), expected)


def test_experts_that_may_be_either_way_round_are_refused(tmp_path: Path) -> None:
    """Without another module to compare widths with; the remedy that is printed is true."""
    folder = together(tmp_path / "a", 1, BOTH[1:], target_modules=[])
    edit(folder, lambda c: c.pop("peft_version"))
    with pytest.raises(AdapterError, match=r"before 0\.19") as caught:
        Adapter.from_pretrained(folder)
    assert '"peft_version": "0.19.0"' in caught.value.remedy
    edit(folder, lambda c: c.update(peft_version="0.19.0"))
    assert_close(ours(folder), in_peft(qwen, folder))


@pytest.mark.parametrize("original", [True, False])
@pytest.mark.parametrize("layout", ["apart", "together"])
@pytest.mark.parametrize("model", MODELS)
def test_fusing_into_bases_of_both_layouts(
    model: str, layout: str, original: bool, tmp_path: Path
) -> None:
    make = MODELS[model][0]
    folder = apart(tmp_path / "a", model, 1)
    expected = in_peft(make, folder)
    if layout == "together":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            peft.PeftModel.from_pretrained(make(), str(folder)).save_pretrained(tmp_path / "n")
        folder = tmp_path / "n"
    make().save_pretrained(tmp_path / "base", save_original_format=original)
    out = tmp_path / "f"
    assert run(["fuse", str(folder), "--base", str(tmp_path / "base"), "-o", str(out)]) == 0
    fused, before = type(make()).from_pretrained(out).state_dict(), make().state_dict()
    changes = {n: fused[n].double() - before[n].double() for n in before}
    assert_close({n: c for n, c in changes.items() if c.any()}, expected)


class Ungated(nn.Module):
    """Experts without a gate (Nemotron-H): two parameters that differ by a transposition."""

    def __init__(self) -> None:
        super().__init__()
        self.up_proj = nn.Parameter(torch.randn(EXPERTS, WIDTH, HIDDEN) * 0.1)
        self.down_proj = nn.Parameter(torch.randn(EXPERTS, HIDDEN, WIDTH) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        return x


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleDict({"experts": Ungated()})])

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[0]["experts"](x)


def test_ungated_experts_are_told_apart(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    def make() -> nn.Module:
        torch.manual_seed(0)
        return Net()

    (tmp_path / "base").mkdir()
    save_file(make().state_dict(), tmp_path / "base" / "model.safetensors")
    targets = ["experts.up_proj", "experts.down_proj"]
    config = peft.LoraConfig(
        r=2, target_modules=[], target_parameters=targets, init_lora_weights=False
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft.get_peft_model(make(), config).save_pretrained(tmp_path / "a")
    out = tmp_path / "f"
    arguments = [str(tmp_path / "a"), "--base", str(tmp_path / "base"), "-o", str(out)]
    assert run(["fuse", *arguments]) == 0
    fused, before = load_file(out / "model.safetensors"), make().state_dict()
    expected = in_peft(make, tmp_path / "a")
    assert_close({n: fused[n].double() - before[n].double() for n in before}, expected)


def test_what_peft_0_18_1_itself_saved_and_merged() -> None:
    """A file that PEFT 0.18.1 wrote, with the deltas of its own `merge_and_unload`.

    Two experts, hidden 4, width 3, stored (experts, out, in): `LoraConfig(r=2, lora_alpha=4,
    target_modules=[], target_parameters=["experts.gate_up_proj", "experts.down_proj"])`.
    """
    from safetensors.torch import load_file

    from lora_merge.adapters.adapter import build_adapter
    from lora_merge.adapters.config import parse_config
    from lora_merge.files.tensor_file import TensorDict

    stored = load_file(Path(__file__).with_name("peft_0_18_1_experts.safetensors"))
    said = {
        "peft_type": "LORA", "peft_version": "0.18.1", "r": 2, "lora_alpha": 4,
        "target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
    }  # fmt: skip
    factors = {k: t for k, t in stored.items() if not k.startswith("delta.")}
    adapter = build_adapter("old", parse_config(said, "old"), TensorDict(factors))
    for name in adapter.modules:
        ours = torch.stack([stack.delta() for stack in adapter.stacks(name)])
        torch.testing.assert_close(ours, stored[f"delta.{name}"], rtol=1e-5, atol=1e-6)
    assert {s.num_experts for s in adapter.modules.values()} == {2}
