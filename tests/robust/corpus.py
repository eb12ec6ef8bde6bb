"""One small valid input of every kind that a command reads, and the commands that read it."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
import yaml
from safetensors.torch import save_file

from builders import SHAPES, save_adapter
from lora_merge.adapters.adapter import Adapter
from lora_merge.mixture.mixture import Mixture

# Name → (files that may be damaged, command line). {name} is a place in the corpus.
COMMANDS: dict[str, tuple[tuple[str, ...], str]] = {
    "info": (("a", "sora"), "info {sora} --json"), "info of one": (("a",), "info {a}"),
    "spectra": (("a", "bare"), "spectra {a} {bare} --alpha 4 --json"),
    "spectra beside a base": (("a", "base"), "spectra {a} --base {base} --json"),
    "compare": (("a",), "compare {a} {b} --json"),
    "cat": (("a", "b"), "merge {a} {b} -M cat -w 0.5 -w -2 -o OUT"),
    "ties": (("a",), "merge {a} {b} -M ties --dtype float16 -o OUT"),
    "merge by energy": (("a",), "merge {a} {b} -M svd --rank energy:0.9 -o OUT"),
    "sce": (("a",), "merge {a} {b} -M sce -o OUT"),
    "wudi": (("a",), "merge {a} {b} -M wudi -o OUT"),
    "dry run": (("a",), "merge {a} {b} -M knots-ties --dry-run --json"),
    "cluster": (("a", "sora"), "cluster {a} {sora} --rank 4 -o OUT"),
    "data": (("statistics",), "merge {a} {b} -M regmean --statistics {statistics} -o OUT"),
    "run": (("recipe",), "run {recipe} -o OUT"),
    "resize": (("a", "sora"), "resize {a} --rank 2 -o OUT"),
    "resize by gates": (("sora",), "resize {sora} --prune-gates -o OUT"),
    "resize by data": (("moments",), "resize {a} --energy 0.9 --bottleneck {moments} -o OUT"),
    "fuse": (("a", "base"), "fuse {a} --base {base} -o OUT"),
    "extract": (("base", "tuned"), "extract --base {base} --tuned {tuned} --rank 2 -o OUT"),
    "gate": (("a",), "gate {a} {b} --preset arrow -o OUT"),
    "gate into": (("mixture",), "gate {c} --into {mixture} -o OUT"),
    "gate from X-LoRA": (("xlora",), "gate {a} {b} --from {xlora} -o OUT"),
    "gate from MeteoRA": (("meteora",), "gate {a} {b} --from {meteora} -o OUT"),
    "export static": (("mixture",), "export {mixture} --to static --rank 4 -o OUT"),
    "export experts": (("mixture",), "export {mixture} --to experts -o OUT"),
}  # fmt: skip


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
    }
    places["bare"].write_bytes((places["b"] / "adapter_model.safetensors").read_bytes())
    _recipe(places)
    _statistics(places)
    _meteora(places)
    Mixture([places["a"], places["b"]], "meteora").save_pretrained(places["mixture"])
    return places


def files_of(place: Path) -> list[Path]:
    """The files of a place that a reader looks at."""
    found = sorted(place.rglob("*")) if place.is_dir() else [place]
    return [path for path in found if path.is_file() and not path.name.startswith(".")]


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
