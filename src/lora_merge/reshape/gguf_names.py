"""Between transformers' names and llama.cpp's: names by the `gguf` package, rows as it wants them.

llama.cpp rotates neighbouring pairs of q and k, transformers halves of a head; where its converter
permutes the rows of these weights (`LlamaModel.permute`), B's rows go the same way. Architectures
whose weights it changes in other ways are refused.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, NoReturn

from torch import Tensor

from lora_merge.adapters.adapter import Adapter
from lora_merge.adapters.config import AdapterConfig
from lora_merge.adapters.forms import ModuleSpec
from lora_merge.adapters.identity.expert_layout import stacked
from lora_merge.adapters.units import Units
from lora_merge.errors import AdapterError
from lora_merge.files.checkpoint import Checkpoint
from lora_merge.files.documents import validated
from lora_merge.files.gguf.reading import require_gguf


@dataclass(frozen=True)
class Architecture:
    """What llama.cpp's converter makes of one type of model.

    Attributes:
        name: Its own name for it.
        turned: Whether the rows of q and k are permuted.
    """

    name: str
    turned: bool = False


# By `model_type`; those whose matrices are renamed, or permuted, and nothing else.
ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture("llama", turned=True),
    "mistral": Architecture("llama", turned=True),
    "mixtral": Architecture("llama", turned=True),
    "granite": Architecture("granite", turned=True),
    "smollm3": Architecture("smollm3", turned=True),
    "olmo": Architecture("olmo", turned=True),
    "olmo2": Architecture("olmo2"),
    "olmo3": Architecture("olmo2"),
    "seed_oss": Architecture("seed_oss"),
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3"),
    "qwen2_moe": Architecture("qwen2moe"),
    "qwen3_moe": Architecture("qwen3moe"),
    "gemma": Architecture("gemma"),
    "gemma2": Architecture("gemma2"),
    "gemma3": Architecture("gemma3"),
    "gemma3_text": Architecture("gemma3"),
    "phi3": Architecture("phi3"),
    "starcoder2": Architecture("starcoder2"),
    "cohere": Architecture("command-r"),
    "cohere2": Architecture("cohere2"),
}
# Its converter takes rows of these vocabularies away.
_CUT_VOCABULARY = ("gemma3", "gemma3_text")
_MOST_LAYERS = 10_000  # llama.cpp's names are listed for each
_PARTS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


@dataclass(frozen=True)
class _Sizes:
    """What is counted with of a base's config.json."""

    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int | None = None
    num_local_experts: int | None = None
    num_experts: int | None = None


@dataclass(frozen=True, eq=False)
class _Model:
    """A base model, as far as names and rows go."""

    base: Checkpoint
    kind: str
    architecture: Architecture
    sizes: _Sizes

    def name(self, module: str) -> str | None:
        """llama.cpp's name of a module; None where it has none."""
        if module == "lm_head" and not self._has_head:
            return None
        found: str | None = self._table.get_name(module.replace("language_model.", ""))
        return found

    @cached_property
    def _table(self) -> Any:
        from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, get_tensor_name_map

        arch = {name: arch for arch, name in MODEL_ARCH_NAMES.items()}[self.architecture.name]
        return get_tensor_name_map(MODEL_ARCH(arch), self.sizes.num_hidden_layers)

    @cached_property
    def _has_head(self) -> bool:
        return any(name.endswith("lm_head.weight") for name in self.base.tensors)

    def heads(self, module: str) -> int | None:
        """Heads whose rows are permuted, None where the rows stay."""
        leaf = module.rpartition(".")[2]
        if not self.architecture.turned or leaf not in ("q_proj", "k_proj"):
            return None
        heads = self.sizes.num_attention_heads
        return heads if leaf == "q_proj" else self.sizes.num_key_value_heads or heads


def to_gguf(adapter: Adapter, base: Checkpoint | None) -> Adapter:
    """An adapter of transformers' names under llama.cpp's, its rows as llama.cpp has them.

    Raises:
        AdapterError: If the base is not named or its architecture not known, or a module has no
            place in the GGUF model.
    """
    model = _model(adapter, base)
    counts = {
        name.rpartition(".")[0]: spec.num_experts
        for name, spec in adapter.modules.items()
        if spec.form == "experts"
    }
    count = model.sizes.num_local_experts or model.sizes.num_experts
    if count:
        for name in adapter.modules:
            stem, middle, _ = name.partition(".experts.")
            if middle:
                stem = stem.replace("block_sparse_moe", "mlp")
                counts.setdefault(f"{stem}.experts", count)
    adapter = stacked(adapter, counts)
    modules: dict[str, ModuleSpec] = {}
    for name, spec in adapter.modules.items():
        for new, changed in _written(adapter, model, name, spec):
            modules[new] = replace(changed, name=new, parameter=None, wrapper=None)
    config = AdapterConfig(
        base_model=adapter.config.base_model, r=None, architecture=model.architecture.name
    )
    return replace(adapter, config=config, modules=dict(sorted(modules.items())), dialect="gguf")


def _written(
    adapter: Adapter, model: _Model, name: str, spec: ModuleSpec
) -> list[tuple[str, ModuleSpec]]:
    """A module's places in the GGUF model, and what stands there."""
    if spec.form == "embedding" and model.kind in _CUT_VOCABULARY:
        _refuse(adapter, name, "has rows that llama.cpp's converter takes away")
    if spec.form == "experts":
        stem, _, parameter = name.rpartition(".")
        parts = _PARTS.get(parameter, ())
        found = [model.name(f"{stem}.{part}") for part in parts]
        places = [place for place in found if place is not None]
        if not parts or len(places) < len(parts):
            _refuse(adapter, name, f"has no place in llama.cpp's {model.architecture.name}")
        rows = spec.d_out // len(parts)
        return [
            (place, _with(spec, partial(_some_rows, start=i * rows, count=rows), d_out=rows))
            for i, place in enumerate(places)
        ]
    place = model.name(name)
    if place is None:
        _refuse(adapter, name, f"has no place in llama.cpp's {model.architecture.name}")
    heads = model.heads(name)
    turned = spec if heads is None else _with(spec, partial(_turned, heads=heads, back=False))
    return [(place, turned)]


def from_gguf(adapter: Adapter, base: Checkpoint | None) -> Adapter:
    """An adapter of llama.cpp's names under those of the base model, rows as transformers has them.

    Raises:
        AdapterError: If the base is not named, is of another architecture, or lacks a module.
    """
    model = _model(adapter, base)
    if adapter.config.architecture != model.architecture.name:
        raise AdapterError(
            f"{adapter.name} belongs to an architecture {adapter.config.architecture}, "
            f"{model.base.folder} is {model.architecture.name}",
            "name the adapter's own base model",
        )
    weights = [n.removesuffix(".weight") for n in model.base.tensors if n.endswith(".weight")]
    back: dict[str, str] = {}
    for name in weights:
        place = model.name(name)
        if place is not None:
            back[place] = name
    stems = {name.partition(".experts.")[0] for name in weights if ".experts." in name}
    for stem in sorted(stems):
        for part in ("gate_proj", "up_proj", "down_proj"):
            place = model.name(f"{stem.replace('block_sparse_moe', 'mlp')}.experts.{part}")
            if place is not None:
                back[place] = f"{stem}.experts.{part}"
    modules: dict[str, ModuleSpec] = {}
    for place, spec in adapter.modules.items():
        if place not in back:
            _refuse(adapter, place, f"has no weight in {model.base.folder}")
        name = back[place]
        if spec.form == "experts":
            modules |= _per_expert(adapter, model, name, spec)
            continue
        heads = model.heads(name)
        modules[name] = replace(
            spec if heads is None else _with(spec, partial(_turned, heads=heads, back=True)),
            name=name,
        )
    config = AdapterConfig(
        base_model=adapter.config.base_model, r=None, fan_in_fan_out=False, task_type="CAUSAL_LM"
    )
    return replace(
        adapter, config=config, modules=dict(sorted(modules.items())), dialect="peft-lora"
    )


def _per_expert(
    adapter: Adapter, model: _Model, name: str, spec: ModuleSpec
) -> dict[str, ModuleSpec]:
    """Modules of single experts, as checkpoints on disk have them."""
    stem, _, part = name.rpartition(".")
    leaf = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}[part]
    modules = {}
    for expert in range(spec.num_experts):
        names = [f"{stem}.{expert}.{one}" for one in (part, leaf)]
        found = [n for n in names if f"{n}.weight" in model.base.tensors]
        if not found:
            _refuse(adapter, spec.name, f"has no weights of its own in {model.base.folder}")
        there = found[0]
        one = _with(spec, partial(_one_expert, count=spec.num_experts, expert=expert))
        modules[there] = replace(one, name=there, form="linear", num_experts=1)
    return modules


def _model(adapter: Adapter, base: Checkpoint | None) -> _Model:
    """What the base's config.json says of names and rows."""
    require_gguf()
    if base is None:
        raise AdapterError(
            f"{adapter.name}: llama.cpp's names and the order of rows depend on the model",
            "name its directory: --base DIR",
        )
    kind = str(base.config.get("model_type"))
    if kind not in ARCHITECTURES:
        raise AdapterError(
            f"{base.folder}: what llama.cpp does with weights of a model of type {kind!r} is not "
            "known here",
            "write it for PEFT and use llama.cpp's convert_lora_to_gguf.py",
        )
    said = base.config.get("text_config") or base.config
    what = f"{base.folder}: config.json"
    sizes = validated(_Sizes, said, what, "get it again", error=AdapterError)
    if not 0 < sizes.num_hidden_layers <= _MOST_LAYERS or sizes.num_attention_heads < 1:
        raise AdapterError(f"{what} says {sizes}", "get it again")
    return _Model(base, kind, ARCHITECTURES[kind], sizes)


def _refuse(adapter: Adapter, name: str, why: str) -> NoReturn:
    raise AdapterError(f"{adapter.name}: {name} {why}", "leave this module out")


def _with(spec: ModuleSpec, change: Callable[[Tensor, Tensor], Units], **fields: Any) -> ModuleSpec:
    """A spec whose units are changed after they are made."""
    return replace(
        spec, recipe=replace(spec.recipe, units=partial(_then, spec.recipe.units, change)), **fields
    )


def _then(
    units: Callable[..., Units],
    change: Callable[[Tensor, Tensor], Units],
    *tensors: Tensor,
    **base: Any,
) -> Units:
    return change(*units(*tensors, **base))


def _turned(a: Tensor, b: Tensor, *, heads: int, back: bool) -> Units:
    """Rows of q or k from halves of each head to neighbouring pairs, or back."""
    half = len(b) // heads // 2
    shape = (heads, half, 2) if back else (heads, 2, half)
    return a, b.reshape(*shape, -1).transpose(1, 2).reshape(b.shape)


def _some_rows(a: Tensor, b: Tensor, *, start: int, count: int) -> Units:
    return a, b[start : start + count]


def _one_expert(a: Tensor, b: Tensor, *, count: int, expert: int) -> Units:
    """One expert of stacked ones, in PEFT's layout (`forms.py`)."""
    down = a.reshape(count, -1, a.shape[1])[expert]
    return down, b.reshape(len(b), -1, count)[:, :, expert].contiguous()
