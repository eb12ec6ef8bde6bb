"""One small valid input of every kind that a command reads."""

import contextlib
import io
import json
import os
from collections.abc import Iterator, Mapping
from itertools import product
from pathlib import Path

import torch
import yaml
from safetensors.torch import save_file
from tiny import letters_model, shapes_of

from builders import SHAPES, save_adapter, save_base, save_parts
from lora_merge.adapters.adapter import Adapter
from lora_merge.files.stamp import begin_stamp
from lora_merge.mixture.mixture import Mixture

_BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
PICTURE_SHAPES = {f"{_BLOCK}.to_q": (16, 12), f"{_BLOCK}.to_out.0": (12, 16)}
# When every file of the corpus was written: caches know files by that.
MADE = 1_700_000_000


def build(root: Path) -> dict[str, Path]:
    """Make the corpus; returns its places by name."""
    places = {
        "a": save_adapter(root / "a", seed=1),
        "b": save_adapter(root / "b", seed=2, r=3, alpha=5, use_rslora=True),
        "c": save_adapter(root / "c", seed=3, rank_pattern={"q_proj": 2}),
        "bare": root / "bare.safetensors",
        "sora": _sora(root / "sora"),
        "base": _base(root / "base", 7, shards=2),
        "tuned": _base(root / "tuned", 8, shards=1),
        "recipe": root / "recipe.yaml",
        "statistics": root / "statistics.safetensors",
        "moments": root / "moments.safetensors",
        "mixture": root / "mixture",
        "xlora": _xlora(root / "xlora"),
        "meteora": root / "meteora.safetensors",
        "loha": _loha(root / "loha"),
        "ia3": _ia3(root / "ia3"),
        "cache": root / "cache",
    }
    places["bare"].write_bytes((places["b"] / "adapter_model.safetensors").read_bytes())
    _recipe(places)
    _statistics(places)
    _meteora(places)
    Mixture([places["a"], places["b"]], "meteora").save_pretrained(places["mixture"])
    places |= _with_a_model(root)
    places["picture"] = picture = save_adapter(
        root / "picture", seed=6, shapes=PICTURE_SHAPES, task_type=None
    )
    for name in ("kohya", "diffusers", "comfyui", "mlx"):
        places[name] = root / name
        source = [str(places["a"])] if name == "mlx" else [str(picture), "--component", "unet"]
        run_quietly("convert", *source, "--to", name, "-o", str(places[name]))
    run_quietly(
        "convert", str(places["one"]), "--to", "gguf", "--base", str(places["model"]),
        "-o", str(root / "gguf"),
    )  # fmt: skip
    places["gguf"] = root / "gguf"
    _age(root)  # shards know their adapters by that
    three = [str(places[name]) for name in "abc"]
    for number in (1, 2):
        shard = ("--scale", "1", "--shard", f"{number}/2", "-o", str(root / "sharded"))
        run_quietly("merge", *three, "-M", "ties", *shard)
    for name, words in (
        ("library", ["pack", *three[:2], "--name", "a", "--name", "b", "-o"]),
        ("slots", ["arrive", *three[:2], "--slots", "2", "--into"]),
    ):
        places[name] = root / name
        run_quietly(*words, str(places[name]))
    places["sharded"], places["index"] = root / "sharded.shards", root / "library" / "library.json"
    places |= _begun(root, places) | _more_kinds(root, places)
    _age(root)
    return places


def _begun(root: Path, places: Mapping[str, Path]) -> dict[str, Path]:
    """What runs leave that were killed: half a merge, a study, a checkpoint of a training."""
    three = [str(places[name]) for name in "abc"]
    whole = ("-M", "ties", "--scale", "1", "--rank", "energy:0.9", "--shard", "1/1")
    run_quietly("merge", *three, *whole, "-o", str(root / "half"))
    half = root / "half.shards"
    (half / "1-of-1" / "shard.json").unlink()
    for path in sorted((half / "1-of-1").glob("*.part"))[1:]:
        path.unlink()
    begin_stamp(half / "1-of-1")
    pair, texts = [str(places["one"]), str(places["two"])], _texts(places)
    how = ("--over", "scale", "--trials", "1", "--sampler", "random")
    run_quietly("search", *pair, *texts, *how, "-o", str(root / "studied"))
    how = ("--steps", "2", "--save-every", "1")
    run_quietly("train", str(places["routed"]), *texts, *how, "-o", str(root / "trained"))
    found = {"half": half, "studied": root / "studied.search"}
    return {**found, "checkpoint": root / "trained.training"}


def _more_kinds(root: Path, places: Mapping[str, Path]) -> dict[str, Path]:
    """Experts, gates over ranks and by text, rows of other kinds, Fisher, a recipe of every key."""
    found = {
        "moe": _moe(root / "moe", 1),
        "experts": _moe(root / "experts", 2),
        "choices": root / "choices.jsonl",
        "fisher": root / "fisher.safetensors",
        "full_recipe": root / "full.yaml",
    }
    choices = {"prompt": "ab", "choices": ["c", "de"], "answer": 1}
    rows = [{**choices, "task": "one"}, {**choices, "answer": 0, "task": "two"}] * 2
    found["choices"].write_text("".join(json.dumps(row) + "\n" for row in rows))
    moments = dict(_tensors(places["moments"]))
    for module, (d_out, _) in SHAPES.items():
        moments[f"{module}.output_fisher"] = _noise(d_out, seed=3).square()
    save_file(moments, found["fisher"])
    found["moe_base"] = Path(save_base(root / "moe_base", dict(_expert_shapes()), num_experts=2))
    pair = [places["one"], places["two"]]
    for name, preset in (("ranked", "smora"), ("retrieving", "retrieve")):
        found[name] = root / name
        Mixture(pair, preset, hidden_size=32).save_pretrained(root / name)
    found["retrieved"] = root / "retrieved"
    run_quietly("train", str(root / "retrieving"), *_texts(places), "-o", str(root / "retrieved"))
    data = {
        "merge_method": "ties",
        "adapters": [
            {"adapter": str(places["a"]), "weight": [1.0, 0.5]},
            {"adapter": str(places["b"]), "parameters": {"density": 0.5}},
        ],
        "rank": "budget:x0.5", "ranks": "per-module", "normalize": "sum", "extras": "drop",
        "norm_equalise": True, "restore_norm": "mean", "smooth": "flat", "space": "core",
        "basis": "stacks", "rename": ["model=net"], "accept_base_models": True, "scale": "auto",
        "base_model": "tiny-base", "version": 1,
    }  # fmt: skip
    found["full_recipe"].write_text(yaml.safe_dump(data))
    return found


def _expert_shapes() -> Iterator[tuple[str, tuple[int, int]]]:
    for expert, leaf in product(range(2), ("gate_proj", "up_proj", "down_proj")):
        size = (16, 12) if leaf == "down_proj" else (12, 16)
        yield f"model.layers.0.mlp.experts.{expert}.{leaf}", size


def _moe(folder: Path, seed: int) -> Path:
    """Experts as modules of their own."""
    return save_adapter(folder, seed=seed, shapes=dict(_expert_shapes()))


def _texts(places: Mapping[str, Path]) -> list[str]:
    return ["--base", str(places["model"]), "--data", str(places["rows"]), "--device", "cpu"]


def _age(folder: Path) -> None:
    for path in folder.rglob("*"):
        os.utime(path, (MADE, MADE))


def run_quietly(*words: str) -> None:
    """Run a command that has to do what it is asked."""
    from lora_merge.cli.app import run

    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        code = run(list(words))
    if code:
        raise AssertionError(f"{words}: {said.getvalue()}")


def files_of(place: Path) -> list[Path]:
    """The files of a place that a reader looks at; stamps where something goes on with it."""
    found = sorted(place.rglob("*")) if place.is_dir() else [place]
    stamped = place.suffix == ".shards" or place.name in ("library", "slots")
    return [p for p in found if p.is_file() and (stamped or not p.name.startswith("."))]


def _with_a_model(root: Path) -> dict[str, Path]:
    """A language model that runs, rows for it, and what fits it."""
    places = {"model": root / "model", "rows": root / "rows.jsonl", "described": root / "described"}
    model = letters_model(places["model"])
    for seed, name in enumerate(("one", "two"), start=10):
        places[name] = save_adapter(root / name, seed=seed, shapes=shapes_of(model, "q_proj"))
    rows = [{"text": "ab ab ab", "expert": "one"}, {"text": "xyz", "expert": "two"}] * 4
    places["rows"].write_text("".join(json.dumps(row) + "\n" for row in rows))
    pair = [places["one"], places["two"]]
    for name, preset in (("routed", "meteora"), ("classified", "xlora")):
        places[name] = root / name
        Mixture(pair, preset, hidden_size=32).save_pretrained(places[name])
    run_quietly("describe", str(places["routed"]), *_texts(places), "-o", str(places["described"]))
    return places


def _noise(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.1


def _sora(folder: Path) -> Path:
    save_adapter(folder, seed=4)
    config = json.loads((folder / "adapter_config.json").read_text())
    config |= {"peft_type": "ADALORA", "init_r": 6, "target_r": 4, "rank_pattern": {}}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    path = folder / "adapter_model.safetensors"
    tensors = dict(_tensors(path))
    for name in list(tensors):
        if name.endswith("lora_A.weight"):
            tensors[name.replace("lora_A.weight", "lora_E")] = _noise(4, 1, seed=len(name))
    save_file(tensors, path, metadata={"format": "pt"})
    return folder


def _loha(folder: Path) -> Path:
    """LyCORIS' Hadamard product, as PEFT writes it."""
    config = {"peft_type": "LOHA", "r": 2, "alpha": 4, "target_modules": ["up_proj", "q_proj"]}
    tensors = {}
    for name, (d_out, d_in) in SHAPES.items():
        for seed, half in enumerate(("w1", "w2")):
            stem = f"base_model.model.{name}.hada_{half}"
            tensors[f"{stem}_a"] = _noise(d_out, 2, seed=seed)
            tensors[f"{stem}_b"] = _noise(2, d_in, seed=seed + 2)
    return save_parts(folder, config, tensors)


def _ia3(folder: Path) -> Path:
    config = {
        "peft_type": "IA3",
        "target_modules": ["up_proj", "q_proj"],
        "feedforward_modules": ["up_proj"],
    }
    tensors = {
        f"base_model.model.{name}.ia3_l": 1 + _noise(1, d_in, seed=5)
        if name.endswith("up_proj")
        else 1 + _noise(d_out, 1, seed=6)
        for name, (d_out, d_in) in SHAPES.items()
    }
    return save_parts(folder, config, tensors)


def _tensors(path: Path) -> Mapping[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(path)


def _base(folder: Path, seed: int, shards: int) -> Path:
    folder.mkdir()
    tensors = {f"{n}.weight": _noise(*s, seed=seed + i) for i, (n, s) in enumerate(SHAPES.items())}
    tensors["model.norm.weight"] = torch.ones(16).bfloat16()
    names = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    table = {name: names[i % shards] for i, name in enumerate(tensors)}
    for file in names:
        own = {name: tensor for name, tensor in tensors.items() if table[name] == file}
        save_file(own, folder / file, metadata={"format": "pt"})
    if shards > 1:
        index = {"metadata": {"total_size": 1}, "weight_map": table}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {"model_type": "llama", "tie_word_embeddings": False, "rope": [0.0, float("inf")]}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "README.md").write_text("---\nlicense: mit\n---\nA base.\n")
    return folder


def _recipe(places: Mapping[str, Path]) -> None:
    data = {
        "merge_method": "dare",
        "adapters": [
            {"adapter": str(places["a"]), "weight": 0.5, "parameters": {"density": 0.5}},
            {"adapter": str(places["b"]), "weight": [{"filter": "mlp", "value": 1}]},
            {"adapter": str(places["bare"]), "alpha": 8, "weight": [0.2, 1.0]},
        ],
        "rank": "energy:0.9", "scale": 1.5, "seed": 3, "dtype": "bfloat16", "version": 1,
    }  # fmt: skip
    places["recipe"].write_text(yaml.safe_dump(data))


def _statistics(places: Mapping[str, Path]) -> None:
    adapters = [Adapter.from_pretrained(places[name]) for name in "ab"]
    tensors, moments = {}, {}
    for module, (_, width) in SHAPES.items():
        ranks = [a.modules[module].rank for a in adapters]
        tensors[f"{module}.owner"] = torch.tensor([0] * ranks[0] + [1] * ranks[1])
        for index in (0, 1):
            z, x = _noise(20, sum(ranks), seed=index), _noise(20, width, seed=index + 5)
            tensors[f"{module}.z.{index}"], tensors[f"{module}.x.{index}"] = z.mT @ z, x.mT @ x
        h = _noise(20, ranks[0], seed=9)
        moments[f"{module}.bottleneck_moment"] = h.mT @ h
    metadata = {"adapters": json.dumps([a.name for a in adapters])}
    save_file(tensors, places["statistics"], metadata=metadata)
    save_file(moments, places["moments"])


def _xlora(folder: Path) -> Path:
    folder.mkdir()
    stem = "base_model.internal_xlora_classifier.layers"
    tensors = {f"{stem}.0.weight": _noise(2, 8, seed=1), f"{stem}.0.bias": _noise(2, seed=2)}
    save_file(tensors, folder / "adapter_model.safetensors")
    raw = {
        "peft_type": "XLORA", "hidden_size": 8, "xlora_depth": 1, "xlora_size": 4,
        "adapters": {"0": "gone", "1": "gone"}, "layerwise_scalings": False,
        "softmax_temperature": 1.0, "global_scaling_weight": 1.0, "scaling_pass_value": 0.0,
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(raw))
    return folder


def _meteora(places: Mapping[str, Path]) -> None:
    halves = [_tensors(places[name] / "adapter_model.safetensors") for name in "ab"]
    tensors = {}
    for module, (_, width) in SHAPES.items():
        stem = f"base_model.model.{module}"
        for half, axis in (("lora_A", 0), ("lora_B", 1)):
            parts = [own[f"{stem}.{half}.weight"] for own in halves]
            tensors[f"{stem}.{half}.default.weight"] = torch.cat(parts, axis)
        tensors[f"{stem}.moe_gate.weight"] = _noise(2, width, seed=3)
    save_file(tensors, places["meteora"])
