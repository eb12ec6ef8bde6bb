"""Any tensor of any format renamed, lost, emptied, made an integer or joined by another: an error.

What is left out below cannot be told from a sound file: a missing alpha means the rank, a shorter
B another module.
"""

import re
from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor

from builders import adapter_parts
from lora_merge.adapters.adapter import Adapter, build_adapter
from lora_merge.adapters.config import parse_config
from lora_merge.errors import LoraMergeError
from lora_merge.files.tensor_file import TensorDict


class Told(TensorDict):
    """Tensors with a header that says something."""

    def __init__(self, tensors: Mapping[str, Tensor], said: Mapping[str, str]) -> None:
        super().__init__(tensors)
        self.said = said

    def metadata(self) -> Mapping[str, str]:
        return self.said


def named(stems: list[str], **parts: tuple[int, ...]) -> dict[str, Tensor]:
    return {
        f"{stem}.{part.replace('__', '.')}": torch.randn(*shape)
        for stem in stems
        for part, shape in parts.items()
    }


FLAT = ["lora_unet_a_b", "lora_unet_c_d"]
PEFT = {"peft_type": "LORA", "r": 4, "lora_alpha": 8}
LLAMA = {"general.architecture": "llama", "general.type": "adapter", "adapter.type": "lora"}
TWO = ["base_model.model.l.0.q", "base_model.model.l.1.q"]
EXPERTS = "base_model.model.l.mlp.experts"
FILES: dict[str, Callable[[], tuple]] = {
    "kohya": lambda: (named(FLAT, lora_down__weight=(4, 8), lora_up__weight=(6, 4)), None, {}),
    "loha": lambda: (
        named(FLAT, hada_w1_a=(6, 2), hada_w1_b=(2, 8), hada_w2_a=(6, 2), hada_w2_b=(2, 8)),
        None,
        {},
    ),
    "diffusers": lambda: (
        named(["unet.x.q", "unet.x.k"], lora_A__weight=(4, 8), lora_B__weight=(6, 4)),
        None,
        {},
    ),
    "comfyui": lambda: (
        named(["diffusion_model.x.q"], lora_A__weight=(4, 8), lora_B__weight=(6, 4)),
        None,
        {},
    ),
    "oft": lambda: (named(FLAT, oft_blocks=(3, 2, 2), rescale=(6, 1)), None, {}),
    "boft": lambda: (named(FLAT, oft_blocks=(1, 3, 2, 2), rescale=(6, 1)), None, {}),
    "ia3": lambda: (
        named(FLAT, weight=(6,)) | {f"{stem}.on_input": torch.tensor(0) for stem in FLAT},
        None,
        {},
    ),
    "mlx dora": lambda: (
        named(["model.layers.0.q", "model.layers.1.q"], lora_a=(8, 4), lora_b=(4, 6), m=(6,)),
        {"fine_tune_type": "dora", "lora_parameters": {"rank": 4, "scale": 2.0}},
        {},
    ),
    "torchtune dora": lambda: (
        named(
            ["layers.0.mlp.w1", "layers.1.mlp.w3"],
            lora_a__weight=(4, 8),
            lora_b__weight=(6, 4),
            magnitude=(6,),
        ),
        PEFT,
        {},
    ),
    "paca": lambda: (
        named(TWO, paca_w=(6, 3)) | {f"{s}.paca_indices": torch.tensor([0, 2, 1]) for s in TWO},
        {**PEFT, "peft_type": "PACA", "paca_alpha": 3},
        {},
    ),
    "flora": lambda: (
        named(
            ["l.0.q.flora_layer", "l.1.q.flora_layer"],
            param_G=(2, 3),
            param_0=(8, 2),
            param_1=(6, 3),
        ),
        {"peft_type": "FLORA", "scale": 0.5},
        {},
    ),
    "mlx": lambda: (
        named(["model.layers.0.q", "model.layers.1.q"], lora_a=(8, 4), lora_b=(4, 6)),
        {"fine_tune_type": "lora", "lora_parameters": {"rank": 4, "scale": 2.0}},
        {},
    ),
    "gguf": lambda: (
        named(["blk.0.attn_v.weight", "blk.1.attn_v.weight"], lora_a=(4, 8), lora_b=(6, 4)),
        None,
        LLAMA,
    ),
    "gguf experts": lambda: (
        named(["blk.0.ffn_up_exps.weight"], lora_a=(3, 4, 8), lora_b=(3, 6, 4)),
        None,
        LLAMA,
    ),
    "peft": lambda: (
        named(TWO, lora_A__weight=(4, 8), lora_B__weight=(6, 4)),
        {**PEFT, "target_modules": ["q"]},
        {},
    ),
    "lora-xs": lambda: (
        named(
            TWO,
            lora_A__weight=(4, 8),
            lora_B__weight=(6, 4),
            default_lora_latent_mapping__weight=(4, 4),
        ),
        {**PEFT, "target_modules": ["q"]},
        {},
    ),
    "peft experts": lambda: (
        named([f"{EXPERTS}.base_layer"], lora_A__weight=(8, 8), lora_B__weight=(12, 8))
        | named([EXPERTS], lora_A__weight=(8, 6), lora_B__weight=(8, 8)),
        {
            **PEFT,
            "target_modules": [],
            "peft_version": "0.21.2",
            "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        },
        {},
    ),
}
LEAVES = (
    "m", "magnitude_x", "lora_C.weight", "lora_diag", "lora_route.weight", "weight", "core", "s2",
    "on_input", "reshape_weight", "bias", "scalar", "gate", "coefficients", "lora_embedding_A",
    "adapter.linear_in.weight",
)  # fmt: skip


# What a sound file may be without: the module is another adapter, LoRA, that is as good.
MAY_LACK = {"oft": "rescale", "boft": "rescale", "mlx dora": ".m", "torchtune dora": "magnitude"}
INTEGERS = ("on_input", "paca_indices")


class Base:
    """A base of 6 x 8 weights."""

    kind = ""

    def shape(self, module: str) -> tuple[int, ...]:
        return 6, 8

    def weight(self, module: str, *, transposed: bool) -> None:
        """Never read: headers tell."""

    def has_bias(self, module: str) -> bool:
        return False


def with_base(
    tensors: Mapping[str, Tensor], config: dict | None, said: Mapping[str, str]
) -> Adapter:
    parsed = None if config is None else parse_config(config, "mine")
    return build_adapter("mine", parsed, Told(tensors, said), base=Base(), rank=1 << 30)  # type: ignore[arg-type]


def opened(tensors: Mapping[str, Tensor], config: dict | None, said: Mapping[str, str]) -> Adapter:
    parsed = None if config is None else parse_config(config, "mine")
    return build_adapter("mine", parsed, Told(tensors, said))


@pytest.mark.parametrize("name", FILES)
def test_no_change_of_a_file_goes_unseen(name: str) -> None:
    tensors, config, said = FILES[name]()
    wide = name in MAY_LACK or name in ("ia3", "paca")
    read = with_base if wide else opened
    assert read(tensors, config, said).modules
    own = (
        r"\.(?:param_|lora_[abAB]|hada_|oft_|paca_|rescale$|m$|magn|on_input$)|(?<=[abcd])\.weight$"
    )
    stems = {
        re.split(own, key)[0].removesuffix(".default_lora_latent_mapping.weight") for key in tensors
    }
    changed = {
        f"and {s}.{x}": {**tensors, f"{s}.{x}": torch.ones(4, 4)} for s in stems for x in LEAVES
    }
    for key, tensor in tensors.items():
        rest = {k: t for k, t in tensors.items() if k != key}
        changed |= {
            f"without {key}": rest,
            f"suffix of {key}": {**rest, f"{key}_x": tensor},
            f"prefix of {key}": {**rest, f"zz.{key}": tensor},
            f"integers in {key}": {**rest, key: tensor.int()},
            f"nothing in {key}": {**rest, key: tensor.reshape(-1)[:0]},
        }
        if tensor.numel() > max(tensor.shape, default=1):
            changed[f"one axis of {key}"] = {**rest, key: tensor.flatten()}
    if name == "ia3":  # which are its own
        changed = {
            k: v
            for k, v in changed.items()
            if not k.endswith((".on_input", ".weight")) or "and" not in k
        }
    for what, other in changed.items():
        if what.startswith("without") and what.endswith(MAY_LACK.get(name, "\n")):
            continue
        if what.startswith("integers") and what.endswith(INTEGERS):
            continue
        with pytest.raises(LoraMergeError) as refusal:
            read(other, config, said)
            pytest.fail(f"{name} {what}: taken as sound")
        assert refusal.value.remedy, what


def test_lora_xs_has_its_core_between_a_and_b() -> None:
    tensors, config, said = FILES["lora-xs"]()
    adapter = opened(tensors, config, said)
    for stem in TWO:
        a, b, core = (
            torch.nn.Linear(*t.mT.shape, bias=False).requires_grad_(False)
            for t in (tensors[f"{stem}.lora_A.weight"], tensors[f"{stem}.lora_B.weight"],
                      tensors[f"{stem}.default_lora_latent_mapping.weight"])
        )  # fmt: skip
        a.weight.copy_(tensors[f"{stem}.lora_A.weight"])
        b.weight.copy_(tensors[f"{stem}.lora_B.weight"])
        core.weight.copy_(tensors[f"{stem}.default_lora_latent_mapping.weight"])
        theirs = 2 * b(core(a(torch.eye(8)))).mT
        (stack,) = adapter.stacks(stem.removeprefix("base_model.model."))
        torch.testing.assert_close(stack.delta(), theirs, rtol=1e-5, atol=1e-5)
    only = {k: t for k, t in tensors.items() if "latent" in k}
    with pytest.raises(LoraMergeError, match=r"A and B of .* are not in the file"):
        opened(only, config, said)


@pytest.mark.parametrize(
    ("leaf", "what"),
    [("adapter.linear_in.weight", "Megatron"), ("q.coefficients", "NOLA"), ("q.s2", "S2FT")],
)
def test_forms_that_are_not_read_are_named(leaf: str, what: str) -> None:
    _, tensors = adapter_parts()
    for given in ({f"decoder.layers.0.{leaf}": torch.ones(2, 4)}, None):
        files = given or {**tensors, f"base_model.model.x.{leaf}": torch.ones(2, 4)}
        with pytest.raises(LoraMergeError, match=what) as refusal:
            opened(files, PEFT if given is None else None, {})
        assert refusal.value.remedy


def test_floras_delta_is_its_core_times_every_factor() -> None:
    """Written out with one einsum, of a linear layer and of a convolution."""
    g = torch.Generator().manual_seed(0)
    shapes = {"lin": ((8, 2), (6, 3)), "conv": ((4, 2), (6, 3), (3, 2), (5, 2))}
    tensors, wanted = {}, {}
    for name, modes in shapes.items():
        core = torch.randn(*(r for _, r in modes), generator=g)
        factors = [torch.randn(*mode, generator=g) for mode in modes]
        stem = f"{name}.flora_layer.param_"
        tensors |= {f"{stem}G": core} | {f"{stem}{i}": f for i, f in enumerate(factors)}
        letters = "ab" if name == "lin" else "abcd"
        terms = ",".join([letters, *(x.upper() + x for x in letters)])
        wanted[name] = 0.5 * torch.einsum(f"{terms}->BA{letters[2:].upper()}", core, *factors)
    adapter = opened(tensors, {"peft_type": "FLORA", "scale": 0.5}, {})
    assert adapter.modules["conv"].kernel == (3, 5) and adapter.modules["conv"].rank == 3
    for name, delta in wanted.items():
        (stack,) = adapter.stacks(name)
        torch.testing.assert_close(stack.delta(), delta.flatten(1), rtol=1e-4, atol=1e-5)
    with pytest.raises(LoraMergeError, match="scale") as refusal:
        opened(tensors, None, {})
    assert "adapter_config.json" in refusal.value.remedy
