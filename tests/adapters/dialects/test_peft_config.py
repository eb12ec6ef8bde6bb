"""PEFT's config against its tensors, and every remedy that is printed, followed."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from builders import adapter_parts, save_parts
from lora_merge.adapters.adapter import Adapter, build_adapter
from lora_merge.adapters.config import parse_config
from lora_merge.adapters.dialects.peft_targets import is_targeted
from lora_merge.cli.app import run
from lora_merge.errors import AdapterError
from lora_merge.files.tensor_file import TensorDict

IDS = torch.arange(2, 14)[None]


def llama(**config: Any) -> nn.Module:
    torch.manual_seed(0)
    shape = {
        "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 2, "initializer_range": 0.2,
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**{**shape, **config})).eval()


def train(folder: Path, config: peft.PeftConfig, make: Callable[[], nn.Module] = llama) -> Any:
    """A saved adapter with random factors; returns the model it is in."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(make(), config)
        torch.manual_seed(1)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    noise = torch.randn_like(parameter)
                    parameter.add_(noise * (0.1 if "lora_A" in name else 0.3))
        model.save_pretrained(folder)
    return model.eval()


def logits(folder: Path, make: Callable[[], nn.Module] = llama) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(make(), str(folder)).eval()(IDS).logits.detach()


LINEAR = ["q_proj", "v_proj", "down_proj"]
FULL_RANK: dict[str, Callable[[], peft.PeftConfig]] = {
    "dora": lambda: peft.LoraConfig(r=4, target_modules=LINEAR, use_dora=True),
    "ia3": lambda: peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[]),
    "oft": lambda: peft.OFTConfig(r=0, oft_block_size=4, target_modules=["q_proj"]),
}


@pytest.mark.parametrize("kind", FULL_RANK)
def test_what_is_no_lora_is_refused_with_a_remedy_that_works(kind: str, tmp_path: Path) -> None:
    """`convert_to_lora` drops DoRA's magnitude without a word and fails for IA3 and OFT."""
    model = train(tmp_path / "a", FULL_RANK[kind]())
    expected = model(IDS).logits.detach()
    with pytest.raises(AdapterError) as refusal:
        Adapter.from_pretrained(tmp_path / "a")
    assert "lora-merge convert --base DIR --energy" in refusal.value.remedy
    llama().save_pretrained(tmp_path / "base")
    out = tmp_path / "lora"
    source, base = str(tmp_path / "a"), str(tmp_path / "base")
    assert run(["convert", source, "--base", base, "--energy", "1", "-o", str(out)]) == 0
    torch.testing.assert_close(logits(out), expected, rtol=1e-3, atol=1e-3)


NO_LORA: dict[str, Callable[[], peft.PeftConfig]] = {
    "alora": lambda: peft.LoraConfig(
        r=4, target_modules=LINEAR, alora_invocation_tokens=[4, 5], task_type="CAUSAL_LM"
    ),
    "replicated": lambda: peft.LoraConfig(
        r=4, target_modules=LINEAR, layer_replication=[(0, 1), (0, 2)]
    ),
    "prompt": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
}


@pytest.mark.parametrize("kind", NO_LORA)
def test_what_no_lora_can_be_says_only_to_leave_it_out(kind: str, tmp_path: Path) -> None:
    train(tmp_path / "a", NO_LORA[kind]())
    with pytest.raises(AdapterError) as caught:
        Adapter.from_pretrained(tmp_path / "a")
    assert "convert_to_lora" not in str(caught.value)
    assert caught.value.remedy == "leave this adapter out"


def opened(config: dict[str, Any], tensors: dict[str, Tensor]) -> Adapter:
    return build_adapter("mine", parse_config(config, "mine"), TensorDict(tensors))


def test_factors_that_the_config_does_not_name_are_refused(tmp_path: Path) -> None:
    """PEFT leaves them out at loading; both remedies that are printed give what PEFT computes."""
    train(tmp_path / "a", peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    from safetensors.torch import load_file, save_file

    from lora_merge.adapters.config import read_config

    raw = dict(read_config(tmp_path / "a" / "adapter_config.json", "a").raw)
    weights = load_file(tmp_path / "a" / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match=r"2 modules .*v_proj.*PEFT would leave them out"):
        opened({**raw, "target_modules": ["q_proj"]}, weights)
    fewer = {k: t for k, t in weights.items() if "v_proj" not in k}
    one = opened({**raw, "target_modules": ["q_proj"]}, fewer)
    assert len(one.modules) == 2
    save_parts(tmp_path / "b", {**raw, "target_modules": ["q_proj"]}, weights)
    one.save_pretrained(tmp_path / "c")
    torch.testing.assert_close(logits(tmp_path / "c"), logits(tmp_path / "b"))
    assert save_file is not None


TARGETS: list[dict[str, Any]] = [
    {"target_modules": ["q_proj", "mlp.up_proj"]},
    {"target_modules": ["model.layers.1.self_attn.q_proj"]},
    {"target_modules": r".*layers\.0.*(q|up)_proj"},
    {"target_modules": ["q_proj"], "layers_to_transform": [1]},
    {"target_modules": ["q_proj"], "layers_to_transform": 0, "layers_pattern": "layers"},
    {"target_modules": ["q_proj", "up_proj"], "exclude_modules": ["layers.0.self_attn.q_proj"]},
    {"target_modules": ["q_proj"], "exclude_modules": r".*1\.self_attn.*"},
]


@pytest.mark.parametrize("fields", TARGETS)
def test_targets_are_those_of_peft(fields: dict[str, Any]) -> None:
    from peft.tuners.tuners_utils import check_target_module_exists

    theirs = peft.LoraConfig(**fields)
    ours = parse_config({"peft_type": "LORA", "r": 8, "lora_alpha": 8, **fields}, "x")
    for name, module in llama().named_modules():
        if isinstance(module, nn.Linear):
            found = bool(check_target_module_exists(theirs, name))
            assert is_targeted(ours, name) == found, name


def test_a_module_adapted_and_saved_whole_is_refused() -> None:
    config, tensors = adapter_parts(modules_to_save=["q_proj"])
    with pytest.raises(AdapterError, match=r"q_proj has factors and is in modules_to_save"):
        opened(config, tensors)


def test_two_alphas_for_one_module_are_refused_once_sorted() -> None:
    """Training takes the first that matches; PEFT sorts the keys when it saves them."""
    pattern = {"layers.0.self_attn.q_proj": 1, "q_proj": 64}
    config, tensors = adapter_parts(alpha_pattern=pattern)
    with pytest.raises(AdapterError, match="matches 2 keys of alpha_pattern"):
        opened(config, tensors)
    first = opened({**config, "alpha_pattern": {"q_proj": 64, **pattern}}, tensors)
    assert first.modules["model.layers.0.self_attn.q_proj"].scaling == 64 / 4
    assert opened({**config, "alpha_pattern": {"q_proj": 64, "k_proj": 1}}, tensors).modules


def test_overlapping_rank_patterns_are_settled_by_the_tensors() -> None:
    config, tensors = adapter_parts(rank_pattern={"q_proj": 2, "layers.0.self_attn.q_proj": 3})
    pattern = {"layers.0.self_attn.q_proj": 3, "q_proj": 2}  # as PEFT saves it
    adapter = opened({**config, "rank_pattern": pattern}, tensors)
    assert [s.rank for n, s in adapter.modules.items() if "q_proj" in n] == [2, 2]


@pytest.mark.parametrize("bias", ["lora_only", "all"])
def test_biases_that_peft_did_not_save_are_told(bias: str) -> None:
    config, tensors = adapter_parts(bias=bias)
    assert any("did not save them" in note for note in opened(config, tensors).notes)
    tensors["base_model.model.model.layers.0.self_attn.q_proj.bias"] = torch.zeros(24)
    assert not opened(config, tensors).notes


@pytest.mark.parametrize("shape", [(0,), (0, 16), (640,)])
def test_saved_modules_of_a_sharded_run_are_refused(shape: tuple[int, ...]) -> None:
    config, tensors = adapter_parts(modules_to_save=["embed_tokens"])
    tensors["base_model.model.model.embed_tokens.weight"] = torch.zeros(shape)
    with pytest.raises(AdapterError, match=r"embed_tokens.weight .* empty or flat") as caught:
        opened(config, tensors)
    assert "shards" in caught.value.remedy


def test_trained_files_beside_the_adapter_are_told_by_merge_and_fuse(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ["non_lora_trainables.bin", "value_head.safetensors", "new_embeddings.safetensors"]
    folder = save_parts(tmp_path / "a", *adapter_parts())
    for name in names:
        (folder / name).write_bytes(b"x")
    (folder / "optimizer.pt").write_bytes(b"x")
    notes = Adapter.from_pretrained(folder).notes
    assert sorted(note.split()[0] for note in notes) == sorted(names)
    assert run(["merge", str(folder), "-M", "cat", "-o", str(tmp_path / "m")]) == 0
    shown = capsys.readouterr().err.replace("\n", " ")
    assert all(name in shown for name in names)


@pytest.mark.parametrize("targets", [["q_proj", "embed_tokens"], ["q_proj", "lm_head"]])
def test_a_tied_head_follows_the_embedding(targets: list[str], tmp_path: Path) -> None:
    def tied() -> nn.Module:
        return llama(tie_word_embeddings=True)

    config = peft.LoraConfig(r=4, target_modules=targets, ensure_weight_tying=True)
    expected = train(tmp_path / "a", config, tied)(IDS).logits.detach()
    Adapter.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")
    torch.testing.assert_close(logits(tmp_path / "b", tied), expected, rtol=1e-4, atol=1e-4)


def test_mixed_dtypes_give_the_wider_one() -> None:
    config, tensors = adapter_parts()
    mixed = {k: t.bfloat16() if "lora_A" in k else t for k, t in tensors.items()}
    assert {s.dtype for s in opened(config, mixed).modules.values()} == {"F32"}
