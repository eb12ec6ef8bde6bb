"""Fusing: the tensors of PEFT's merge_and_unload, in the base's dtype, and nothing else touched."""

import json
import warnings
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from adapters.test_peft_oracle import FORMS, Model, save, train
from builders import adapter_parts, save_adapter, save_parts
from lora_merge.adapters.adapter import Adapter
from lora_merge.cli.commands.fuse import command
from lora_merge.errors import AdapterError, OutputError, SourceError
from lora_merge.files.stamp import STAMP
from lora_merge.reshape import fuse as fuse_module
from lora_merge.reshape.fuse import plan_fuse


def fuse(adapter, base, out, *, weight=1.0, force=False):
    return plan_fuse(adapter, base, weight=weight).run(out, force=force)


def base_of(folder: Path, tensors, *, shards: int = 1, config=None) -> Path:
    """A model directory with some tensors, a config and a tokenizer."""
    folder.mkdir(parents=True)
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    names = sorted(tensors)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    else:
        weight_map = {}
        for index in range(shards):
            file = f"model-{index + 1:05}-of-{shards:05}.safetensors"
            part = {name: tensors[name] for name in names[index::shards]}
            save_file(part, folder / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(part, file)
        total = sum(t.numel() * t.element_size() for t in tensors.values())
        index_text = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map})
        (folder / "model.safetensors.index.json").write_text(index_text)
    (folder / "config.json").write_text(json.dumps(config or {"model_type": "test"}))
    (folder / "tokenizer.json").write_text("{}")
    return folder


def read(folder: Path):
    return {
        k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()
    }


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shards", [1, 3])
def test_every_form_equals_merge_and_unload(form, shards, tmp_path, monkeypatch):
    monkeypatch.setattr(fuse_module, "_BAND_ENTRIES", 37)  # several bands for every tensor
    torch.manual_seed(0)
    base = base_of(tmp_path / "base", Model().state_dict(), shards=shards)
    trained = train(form, 3)
    adapter = Adapter.from_pretrained(save(trained, tmp_path / "adapter"))
    report = fuse(adapter, base, tmp_path / "out")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = trained.merge_and_unload().state_dict()
    fused = read(tmp_path / "out")
    assert fused.keys() == expected.keys()
    changed = {name for name, tensor in read(base).items() if not torch.equal(tensor, fused[name])}
    for name, tensor in expected.items():
        torch.testing.assert_close(fused[name], tensor, msg=lambda text, n=name: f"{n}: {text}")
    assert len(changed) >= report.modules > 0
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {path.name for path in base.iterdir()} | {"README.md", STAMP}


class _Attention(nn.Module):
    """Attention as torch and OpenCLIP have it: one parameter for three projections."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attn(x, x, x, need_weights=False)[0]


def test_torchs_own_attention_is_left_to_peft(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(_Attention(), nn.Linear(16, 16))
    base = base_of(tmp_path / "base", model.state_dict())
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["attn", "1"], init_lora_weights=False)
    trained = get_peft_model(model, config).eval()
    x = torch.randn(2, 5, 16)
    wanted = trained(x).detach()
    adapter = Adapter.from_pretrained(save(trained, tmp_path / "a"))
    with pytest.raises(AdapterError, match=r"0\.attn is an nn.MultiheadAttention.*out_proj"):
        fuse(adapter, base, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    torch.testing.assert_close(trained.merge_and_unload()(x), wanted)  # the remedy


def _language_model(kind: str, tie: bool) -> nn.Module:
    import transformers

    torch.manual_seed(1)
    if kind == "llama":
        config = transformers.LlamaConfig(
            vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=tie,
        )  # fmt: skip
        return transformers.LlamaForCausalLM(config).eval()
    config = transformers.GPT2Config(
        vocab_size=40, n_positions=32, n_embd=16, n_layer=2, n_head=2, tie_word_embeddings=tie,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config).eval()


@pytest.mark.parametrize(
    ("kind", "tie", "targets"),
    [
        ("llama", False, ["q_proj", "down_proj", "lm_head"]),
        ("llama", True, ["q_proj", "embed_tokens"]),
        ("llama", True, ["v_proj", "lm_head"]),
        ("llama", True, ["embed_tokens", "lm_head"]),
        ("llama", True, ["q_proj"]),
        ("gpt2", True, ["c_attn", "c_proj", "c_fc"]),
        ("gpt2", True, ["c_proj"]),
        ("gpt2", True, ["c_attn", "wte"]),
    ],
)
@pytest.mark.parametrize("form", ["whole", "sharded", "bare"])
def test_a_fused_language_model_has_the_logits_of_base_and_adapter(
    kind, tie, targets, form, tmp_path
):
    """Also where the head shares the embedding's storage and only one of them is adapted."""
    from transformers import AutoModelForCausalLM

    model = _language_model(kind, tie)
    model.save_pretrained(tmp_path / "base", max_shard_size="8KB" if form == "sharded" else "1GB")
    if form == "bare":  # as openai-community/gpt2 is stored: no prefix, and no head
        if not tie:
            pytest.skip("a bare checkpoint has no head of its own")
        prefix = "transformer." if kind == "gpt2" else "model."
        state = load_file(tmp_path / "base" / "model.safetensors")
        state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
        save_file(state, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = LoraConfig(
            r=3, target_modules=targets, fan_in_fan_out=kind == "gpt2", task_type="CAUSAL_LM"
        )
        trained = get_peft_model(model, config)
        for name, parameter in trained.named_parameters():
            if "lora_" in name:
                nn.init.normal_(parameter, std=0.2)
        trained.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
        tokens = torch.arange(12).view(2, 6)
        with torch.no_grad():
            expected = trained.eval()(tokens).logits
    report = fuse(
        Adapter.from_pretrained(tmp_path / "adapter"), tmp_path / "base", tmp_path / "out"
    )
    fused, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    with torch.no_grad():
        torch.testing.assert_close(fused.eval()(tokens).logits, expected, rtol=1e-4, atol=1e-4)
    alone = tie and bool({"embed_tokens", "lm_head", "wte"} & set(targets))
    assert report.untied == (("lm_head.weight",) if alone else ())


def test_a_tied_head_that_is_stored_all_the_same_stays_what_it_was(tmp_path):
    from transformers import AutoModelForCausalLM

    model = _language_model("llama", True)
    model.save_pretrained(tmp_path / "base")
    state = load_file(tmp_path / "base" / "model.safetensors")
    head = state["model.embed_tokens.weight"]
    save_file({**state, "lm_head.weight": head.clone()}, tmp_path / "base" / "model.safetensors")
    config, _ = adapter_parts(target_modules=["embed_tokens"])
    tensors = {
        "base_model.model.model.embed_tokens.lora_embedding_A": torch.randn(4, 40),
        "base_model.model.model.embed_tokens.lora_embedding_B": torch.randn(16, 4),
    }
    adapter = Adapter.from_pretrained(save_parts(tmp_path / "a", config, tensors))
    fuse(adapter, tmp_path / "base", tmp_path / "out")
    fused = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(fused.lm_head.weight, head)
    a, b = tensors.values()
    torch.testing.assert_close(fused.model.embed_tokens.weight.data, head + 2 * (b @ a).mT)


def test_a_half_precision_base_is_rounded_once(tmp_path):
    torch.manual_seed(0)
    state = {name: tensor.bfloat16() for name, tensor in Model().state_dict().items()}
    base = base_of(tmp_path / "base", state)
    trained = train("linear", 3)
    adapter = Adapter.from_pretrained(save(trained, tmp_path / "adapter"))
    fuse(adapter, base, tmp_path / "out", weight=-0.5)
    fused = read(tmp_path / "out")
    name = "layers.0.q_proj"
    delta = trained.get_submodule("base_model.model." + name).get_delta_weight("default").detach()
    exact = state[f"{name}.weight"].double() - 0.5 * delta.double()
    assert fused[f"{name}.weight"].dtype == torch.bfloat16
    assert torch.equal(fused[f"{name}.weight"], exact.float().bfloat16())
    for other, tensor in state.items():
        if not other.endswith(("q_proj.weight", "up_proj.weight")):
            assert torch.equal(fused[other], tensor)


def test_prefixes_of_bare_and_task_models_are_bridged_both_ways(tmp_path):
    adapter = Adapter.from_pretrained(
        save_adapter(tmp_path / "a", shapes={"transformer.h.0.mlp": (6, 4)})
    )
    weight = torch.zeros(6, 4)
    a, b = adapter.read("transformer.h.0.mlp")
    for place, name in enumerate(("h.0.mlp", "transformer.h.0.mlp", "model.transformer.h.0.mlp")):
        base = base_of(tmp_path / f"base{place}", {f"{name}.weight": weight})
        fuse(adapter, base, tmp_path / f"out{place}")
        fused = read(tmp_path / f"out{place}")
        torch.testing.assert_close(fused, {f"{name}.weight": b @ a * 2})


def test_a_head_that_the_base_lacks_joins_it_under_the_task_models_names(tmp_path):
    config, tensors = adapter_parts(
        modules_to_save=["classifier"], shapes={"roberta.layer.0.query": (6, 4)}
    )
    tensors["base_model.model.classifier.weight"] = torch.randn(2, 6)
    adapter = Adapter.from_pretrained(save_parts(tmp_path / "a", config, tensors))
    extra = {"layer.0.query.weight": torch.zeros(6, 4), "layer.0.position_ids": torch.arange(9)}
    for shards in (1, 2):
        base = base_of(tmp_path / f"base{shards}", extra, shards=shards)
        out = tmp_path / f"out{shards}"
        report = fuse(adapter, base, out)
        fused = read(out)
        assert report.added == ("classifier.weight",)
        assert set(fused) == {
            "classifier.weight", "roberta.layer.0.query.weight", "roberta.layer.0.position_ids"
        }  # fmt: skip
        torch.testing.assert_close(
            fused["classifier.weight"], tensors["base_model.model.classifier.weight"]
        )
        assert torch.equal(fused["roberta.layer.0.position_ids"], torch.arange(9))
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(fused)
    assert index["metadata"]["total_size"] == sum(
        t.numel() * t.element_size() for t in fused.values()
    )


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"other.weight": torch.zeros(6, 4)}, "no tensor"),
        ({"proj.weight": torch.zeros(6, 5)}, "6 x 4"),
        ({"proj.weight": torch.zeros(6, 4, dtype=torch.int8)}, "quantised"),
    ],
)
def test_a_base_that_does_not_fit_is_refused_and_nothing_written(tensors, message, tmp_path):
    adapter = Adapter.from_pretrained(save_adapter(tmp_path / "a", shapes={"proj": (6, 4)}))
    base = base_of(tmp_path / "base", tensors)
    with pytest.raises(AdapterError, match=message):
        fuse(adapter, base, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"a", "base"}


@pytest.mark.parametrize(
    ("shapes", "tensors", "config", "words"),
    [
        ({"proj": (6, 4)}, {"proj.qweight": (6, 4)}, {"quant_method": "gptq"}, "quantised .gptq"),
        ({"proj": (6, 4)}, {"proj.weight": (6, 4)}, {"load_in_4bit": True}, "is quantised"),
        (
            {"mlp.experts": (6, 4)},
            {"mlp.experts.0.up_proj.weight": (6, 4), "mlp.experts.1.up_proj.weight": (6, 4)},
            None,
            "stores them apart",
        ),
        (
            {"mlp.experts.0.up_proj": (6, 4)},
            {"mlp.experts.up_proj": (2, 4, 6)},
            None,
            "in one tensor",
        ),
    ],
    ids=["gptq", "bnb", "split-base", "fused-base"],
)
def test_bases_in_another_form_are_refused_with_the_reason(
    shapes, tensors, config, words, tmp_path
):
    folder = save_adapter(tmp_path / "a", shapes=shapes)
    base = base_of(
        tmp_path / "base",
        {name: torch.zeros(shape) for name, shape in tensors.items()},
        config={"quantization_config": config} if config else None,
    )
    with pytest.raises(AdapterError, match=words) as caught:
        fuse(Adapter.from_pretrained(folder), base, tmp_path / "out")
    assert "fuse into" in caught.value.remedy
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("sharded", [False, True])
def test_a_grown_vocabulary_replaces_the_bases(tie, sharded, tmp_path):
    """Tokens added before training: embedding and head are saved whole, with more rows."""
    from transformers import AutoModelForCausalLM

    model = _language_model("llama", tie)
    model.save_pretrained(tmp_path / "base", max_shard_size="8KB" if sharded else "1GB")
    grown = model.config.vocab_size + 3
    model.resize_token_embeddings(grown)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        saved_whole = ["embed_tokens", "lm_head"]
        config = LoraConfig(
            r=3, target_modules=["q_proj"], modules_to_save=saved_whole, task_type="CAUSAL_LM"
        )
        trained = get_peft_model(model, config)
        for name, parameter in trained.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                nn.init.normal_(parameter, std=0.2)
        trained.save_pretrained(tmp_path / "adapter")
        tokens = torch.arange(grown - 12, grown).view(2, 6)
        with torch.no_grad():
            expected = trained.eval()(tokens).logits
    adapter = Adapter.from_pretrained(tmp_path / "adapter")
    report = fuse(adapter, tmp_path / "base", tmp_path / "out")
    assert any("vocabulary was resized" in note for note in report.notes)
    fused, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert fused.config.vocab_size == grown
    with torch.no_grad():
        torch.testing.assert_close(fused.eval()(tokens).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tied", [True, False])
def test_half_a_resized_vocabulary_is_refused_with_what_to_do(tied, tmp_path):
    config, tensors = adapter_parts(shapes={"proj": (6, 4)}, modules_to_save=["embed_tokens"])
    tensors["base_model.model.embed_tokens.weight"] = torch.zeros(12, 4)
    adapter = Adapter.from_pretrained(save_parts(tmp_path / "a", config, tensors))
    base = {"proj.weight": torch.zeros(6, 4), "embed_tokens.weight": torch.zeros(10, 4)}
    if not tied:
        base["lm_head.weight"] = torch.zeros(10, 4)
    folder = base_of(tmp_path / "base", base, config={"tie_word_embeddings": tied})
    with pytest.raises(AdapterError, match=r"embed_tokens.*12 rows.*lm_head") as caught:
        fuse(adapter, folder, tmp_path / "out")
    assert "resize_token_embeddings(12)" in caught.value.remedy
    assert not (tmp_path / "out").exists()


def test_the_card_and_the_adapters_tokenizer(tmp_path):
    import yaml

    folder = save_adapter(tmp_path / "a", shapes={"proj": (6, 4)})
    (folder / "tokenizer_config.json").write_text('{"chat_template": "theirs"}')
    base = base_of(tmp_path / "base", {"proj.weight": torch.zeros(6, 4)})
    (base / "README.md").write_text("---\nlicense: mit\n---\n\n# The base\n")
    (base / "tokenizer_config.json").write_text("{}")
    report = fuse(Adapter.from_pretrained(folder), base, tmp_path / "out", weight=0.5)
    out = tmp_path / "out"
    assert (out / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    assert "theirs" in (out / "tokenizer_config.json").read_text()
    assert any("tokenizer_config.json" in note for note in report.notes)
    card = (out / "README.md").read_text()
    head = yaml.safe_load(card.split("---")[1])
    assert (head["base_model"], head["license"]) == ("tiny-base", "mit")
    assert head["base_model_relation"] == "finetune"
    assert str(folder) in card and "0.5" in card and "The base\n" not in card


def test_overflow_and_full_targets_leave_nothing_behind(tmp_path):
    adapter = Adapter.from_pretrained(save_adapter(tmp_path / "a", shapes={"proj": (6, 4)}))
    base = base_of(tmp_path / "base", {"proj.weight": torch.full((6, 4), 65000.0).half()})
    with pytest.raises(AdapterError, match="float16"):
        fuse(adapter, base, tmp_path / "out", weight=1e6)
    with pytest.raises(OutputError, match="input"):
        fuse(adapter, base, base, force=True)
    assert {path.name for path in tmp_path.iterdir()} == {"a", "base"}


def test_damaged_and_missing_bases_are_named(tmp_path):
    adapter = Adapter.from_pretrained(save_adapter(tmp_path / "a", shapes={"proj": (6, 4)}))
    base = base_of(tmp_path / "base", {"proj.weight": torch.zeros(6, 4)}, shards=1)
    for broken in (b"", b"\xff" * 40, (base / "model.safetensors").read_bytes()[:-1]):
        (base / "model.safetensors").write_bytes(broken)
        with pytest.raises(SourceError, match="safetensors"):
            fuse(adapter, base, tmp_path / "out")
    (base / "model.safetensors").unlink()
    with pytest.raises(SourceError, match="no safetensors"):
        fuse(adapter, base, tmp_path / "out")
    with pytest.raises(SourceError, match="no such directory"):
        fuse(adapter, tmp_path / "nowhere", tmp_path / "out")
    sharded = base_of(
        tmp_path / "sharded", {"proj.weight": torch.zeros(6, 4), "x": torch.zeros(1)}, shards=2
    )
    (sharded / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(SourceError, match="missing"):
        fuse(adapter, sharded, tmp_path / "out")


def test_the_command_prints_one_json_document(tmp_path):
    save_adapter(tmp_path / "a", shapes={"proj": (6, 4)})
    base = base_of(tmp_path / "base", {"proj.weight": torch.zeros(6, 4)})
    arguments = [str(tmp_path / "a"), "--base", str(base), "-o", str(tmp_path / "out"), "--json"]
    result = CliRunner().invoke(command, arguments, catch_exceptions=False)
    assert json.loads(result.output)["modules"] == 1
