"""From one family's module names to another's, as far as a rule or the base model tells them."""

from collections.abc import Callable, Mapping
from dataclasses import replace

from lora_merge.adapters.adapter import Adapter
from lora_merge.adapters.base_weights import CheckpointBase
from lora_merge.adapters.formats.file_format import FileFormat
from lora_merge.adapters.formats.table import naming_of
from lora_merge.adapters.identity.expert_choice import as_switch, from_switch
from lora_merge.errors import AdapterError
from lora_merge.files.checkpoint import Checkpoint
from lora_merge.reshape.gguf_names import from_gguf, to_gguf

# A dialect that reads a naming back; transformers' own has several, PEFT's stands for them.
_DIALECTS = {"transformers": "peft-lora"}
# kohya's prefix ← the component of a diffusers pipeline.
_FLAT = {
    "unet": "lora_unet",
    "transformer": "lora_transformer",
    "text_encoder": "lora_te",
    "text_encoder_2": "lora_te2",
    "text_encoder_3": "lora_te3",
    "prior": "lora_prior",
}


def renamed(
    adapter: Adapter,
    target: FileFormat,
    *,
    component: str | None = None,
    base: Checkpoint | None = None,
) -> Adapter:
    """The adapter under the names of a format.

    Args:
        adapter: The adapter.
        target: The format it will be written in.
        component: The part of a pipeline ("unet", "transformer") that bare names belong to.
        base: The base model, which tells kohya's flattened names apart.

    Raises:
        AdapterError: If no rule leads from one naming to the other; names what would help.
    """
    source = naming_of(adapter)
    if target.name == "mlx" and source == "transformers":
        adapter = as_switch(adapter, None if base is None else CheckpointBase(base))
    elif adapter.dialect == "mlx" and target.name != "mlx":
        adapter = from_switch(adapter)
    if source == target.naming:
        if component is not None:
            raise AdapterError(
                f"{adapter.name}: its names stay as they are, so no component is put before them",
                "leave --component out",
            )
        return adapter
    if target.naming == "gguf" and source == "transformers":
        return to_gguf(adapter, base)
    if source == "gguf" and target.naming == "transformers":
        return from_gguf(adapter, base)
    rules: Mapping[tuple[str, str], Callable[[str], str]] = {
        ("transformers", "diffusers"): lambda name: f"{_needed(adapter, component)}.{name}",
        ("transformers", "comfyui"): lambda name: f"diffusion_model.{name}",
        ("transformers", "kohya"): lambda name: _flat(_needed(adapter, component), name, False),
        ("diffusers", "transformers"): lambda name: name.partition(".")[2],
        ("diffusers", "kohya"): lambda name: _flat_of_diffusers(adapter, name),
        ("comfyui", "transformers"): lambda name: _after(name, "diffusion_model."),
        ("comfyui", "kohya"): lambda name: _flat("unet", _after(name, "diffusion_model."), False),
        ("kohya", "transformers"): lambda name: _unflat(adapter, name, base),
        ("kohya", "comfyui"): lambda name: f"diffusion_model.{_unflat(adapter, name, base)}",
        ("kohya", "diffusers"): lambda name: (
            f"{component or _component_of(adapter, name)}.{_unflat(adapter, name, base)}"
        ),
    }
    rule = rules.get((source, target.naming))
    if rule is None:
        pipelines = "gguf" not in (source, target.naming)
        raise AdapterError(
            f"{adapter.name}: its modules are named as {source} does, and no rule leads to the "
            f"names of {target.title}",
            "give --pipeline, and diffusers' own converters rename them"
            if pipelines
            else "write it for PEFT first: --to peft --base DIR",
        )
    if source == "diffusers" and target.naming == "transformers":
        parts = sorted({name.partition(".")[0] for name in adapter.modules})
        if len(parts) > 1:
            raise AdapterError(
                f"{adapter.name} adapts {' and '.join(parts)}, which are models of their own",
                "write it for diffusers",
            )
    return _apply(adapter, rule, _DIALECTS.get(target.naming, target.name))


def _apply(adapter: Adapter, rule: Callable[[str], str], dialect: str) -> Adapter:
    names = {name: rule(name) for name in adapter.modules}
    if len(set(names.values())) < len(names):
        raise AdapterError(
            f"{adapter.name}: two of its modules get one name", "write it in its own format"
        )
    base = adapter.base
    back = {new: old for old, new in names.items()}
    extras = {}
    for name, extra in adapter.extras.items():
        module, _, leaf = name.rpartition(".")
        new = f"{rule(module)}.{leaf}"
        extras[new] = replace(extra, name=new)
    return replace(
        adapter,
        config=replace(adapter.config, target_modules=None),
        modules={names[name]: replace(s, name=names[name]) for name, s in adapter.modules.items()},
        extras=extras,
        dialect=dialect,
        base=None if base is None else lambda module: base(back[module]),
    )


def _needed(adapter: Adapter, component: str | None) -> str:
    """The component, where there is one: a language model is no part of a pipeline's image side."""
    if adapter.config.task_type is not None and component in (None, "unet", "transformer"):
        raise AdapterError(
            f"{adapter.name} was trained for {adapter.config.task_type}: its base is no diffusion "
            "model",
            "write it for peft or mlx; of a pipeline's text encoder, give --component text_encoder",
        )
    if component is None:
        raise AdapterError(
            "PEFT's names do not say which part of the pipeline they belong to",
            "give --component unet or --component transformer",
        )
    return component


def _flat(component: str, name: str, several: bool) -> str:
    prefix = _FLAT.get(component)
    if prefix is None:
        raise AdapterError(f"{component} has no name in kohya's files", "write it for diffusers")
    if several and component == "text_encoder":
        prefix = "lora_te1"
    return f"{prefix}_{name.replace('.', '_')}"


def _flat_of_diffusers(adapter: Adapter, name: str) -> str:
    component, _, rest = name.partition(".")
    several = any(module.startswith("text_encoder_2.") for module in adapter.modules)
    return _flat(component, rest, several)


def _after(name: str, prefix: str) -> str:
    if not name.startswith(prefix):
        raise AdapterError(f"{name} does not begin with {prefix}", "write it for ComfyUI")
    return name.removeprefix(prefix)


def _component_of(adapter: Adapter, name: str) -> str:
    """The component that kohya's prefix means."""
    for component, prefix in sorted(_FLAT.items(), key=lambda item: -len(item[1])):
        if name.startswith(prefix + "_") or (
            component == "text_encoder" and name.startswith("lora_te1_")
        ):
            return component
    raise AdapterError(
        f"{adapter.name}: {name} does not say which part of the pipeline it is in",
        "give --component unet or --component transformer",
    )


def _unflat(adapter: Adapter, name: str, base: Checkpoint | None) -> str:
    """A flattened name's path in the base model, whose own names tell the dots."""
    if base is None:
        raise AdapterError(
            f"{adapter.name}: {name} is flattened, and only the model tells where the dots were",
            "name the model's directory: --base DIR, or give --pipeline for diffusers' converters",
        )
    weights = (n.removesuffix(".weight") for n in base.tensors if n.endswith(".weight"))
    ends = [w for w in weights if name.endswith("_" + w.replace(".", "_"))]
    longest = max(map(len, ends), default=0)
    found = [end for end in ends if len(end) == longest]
    if len(found) != 1:
        what = f"could be {' or '.join(sorted(found))}" if found else "is no module"
        raise AdapterError(f"{adapter.name}: {name} {what} of {base.folder}", "name the right base")
    return found[0]
