"""Tensor names of image and video adapters: kohya, LyCORIS, diffusers, ComfyUI and their kin."""

import re

from lora_merge.adapters.dialects.dialect import Header
from lora_merge.adapters.dialects.grouping import Group
from lora_merge.adapters.dialects.spelling import canonical
from lora_merge.errors import AdapterError

# What a name ends in → the part of the module it is. Longer endings stand first.
_FACTORS = (
    (r"\.lora_(down|up|mid)\.weight", "lora_{}"),
    (r"\.lora_linear_layer\.(down|up)\.weight", "lora_{}"),
    (r"\.lora\.(down|up)\.weight", "lora_{}"),
    (r"_lora\.(down|up)\.weight", "lora_{}"),
    (r"\.lora_(A|B)(?:\.default)?\.weight", "lora_{}"),
    (r"\.lora_(A|B)", "lora_{}"),
    (r"\.lora_B(?:\.default)?\.(bias)", "lora_{}"),
    (r"\.(hada_(?:w[12]_[ab]|t[12]))", "{}"),
    (r"\.(lokr_(?:w[12](?:_[ab])?|t[12]))", "{}"),
    (r"\.([ab][12m]\.weight)", "{}"),
    (r"\.lora_(magnitude_vector)(?:\.weight)?", "{}"),
    (
        r"\.(alpha|dora_scale|magnitude|diff|diff_b|w_norm|b_norm|oft_blocks|oft_diag|rescale"
        r"|on_input|scalar|set_weight|reshape_weight)",
        "{}",
    ),
)
_ENDINGS = tuple((re.compile(pattern + "$"), part) for pattern, part in _FACTORS)
_SAME = {"lora_A": "lora_down", "lora_B": "lora_up"}
# IA3's mark; its scale is called as a module's own weight is.
_IA3 = "on_input"
# Before PEFT, diffusers kept an attention's factors in its processor.
_PROCESSOR = re.compile(r"\.processor\.(to_[qkv]|to_out)$")

COMPONENTS = (
    "unet",
    "transformer",
    "transformer_2",
    "text_encoder",
    "text_encoder_2",
    "text_encoder_3",
    "prior",
)
_COMFY = ("diffusion_model", "text_encoders")
_FLAT = re.compile(r"^(lora_(unet|te\d?|prior|transformer|text)|lycoris|oft_unet)_")
# Language models whose own names begin as a diffusion transformer's component does.
_LANGUAGE = re.compile(r"^transformer\.(h|encoder|word_embeddings|wte)\.")


def split_name(key: str) -> tuple[str, str] | None:
    """(module, part) of a tensor name, None if it has no known ending."""
    for pattern, part in _ENDINGS:
        match = pattern.search(key)
        if match is not None and match.start() > 0:
            name = part.format(match[1])
            module = _PROCESSOR.sub(_without_processor, key[: match.start()])
            return canonical(module), _SAME.get(name, name)
    return None


def _without_processor(match: re.Match[str]) -> str:
    return ".to_out.0" if match[1] == "to_out" else f".{match[1]}"


def group_names(header: Header) -> dict[str, Group]:
    """All modules of a file by name; tensors whose names have no known ending are left out.

    Raises:
        AdapterError: If two names mean the same part of one module.
    """
    keys: dict[str, dict[str, str]] = {}
    for key in sorted(header.entries):
        place = split_name(key)
        if place is None:
            continue
        module, part = place
        parts = keys.setdefault(module, {})
        if part in parts:
            raise AdapterError(
                f"{header.adapter}: {key} and {parts[part]} both say what {module} has as {part}",
                "take one of the two out of the file",
            )
        parts[part] = key
        weight = key.removesuffix(_IA3) + "weight"
        if part == _IA3 and weight in header.entries:
            parts["weight"] = weight
    return {module: Group(header, module, parts) for module, parts in sorted(keys.items())}


def family_of(header: Header) -> str | None:
    """Whose spelling a file's names have: "kohya", "diffusers", "comfyui" or None."""
    if header.config is not None and header.config.raw:
        return None  # a config beside the file says what it is
    if any(_FLAT.match(key) for key in header.entries):
        return "kohya"
    places = [split_name(key) for key in header.entries]
    known = [place for place in places if place is not None]
    if not known or any(key.startswith("base_model.model.") for key in header.entries):
        return None
    heads = {module.partition(".")[0] for module, _ in known}
    if heads & set(_COMFY):
        return "comfyui"
    if heads & set(COMPONENTS) and not any(_LANGUAGE.match(module) for module, _ in known):
        return "diffusers"
    parts = {part for _, part in known}
    marked = "alpha" in parts or any(p.startswith(("hada_", "lokr_", "a1.")) for p in parts)
    return "comfyui" if marked or _old_spelling(header) else None


def _old_spelling(header: Header) -> bool:
    """Factors named down and up, which PEFT never writes."""
    return any(re.search(r"lora(_linear_layer)?[._](down|up)\.weight$", k) for k in header.entries)
