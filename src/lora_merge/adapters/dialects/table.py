"""All dialects. The first that recognises a file reads it."""

from math import prod

from lora_merge.adapters.dialects.dialect import Claims, Dialect, Header
from lora_merge.adapters.dialects.diffusion.dialects import COMFYUI, DIFFUSERS, KOHYA
from lora_merge.adapters.dialects.language.gguf import GGUF
from lora_merge.adapters.dialects.language.mlx import MLX
from lora_merge.adapters.dialects.language.tinker import TINKER
from lora_merge.adapters.dialects.language.torchtune import TORCHTUNE
from lora_merge.adapters.dialects.looks_like import refuse_unclaimed
from lora_merge.adapters.dialects.peft_lora import PEFT_LORA
from lora_merge.adapters.dialects.tuners.dialect import PEFT_TUNERS
from lora_merge.adapters.dialects.tuners.lora_variants import LORA_VARIANTS
from lora_merge.adapters.forms import ModuleSpec
from lora_merge.adapters.identity.expert_names import is_expert_module
from lora_merge.errors import AdapterError

# PEFT's own names are also those of its many variants, so its row stands last.
DIALECTS: tuple[Dialect, ...] = (
    PEFT_TUNERS,
    LORA_VARIANTS,
    TINKER,
    GGUF,
    MLX,
    TORCHTUNE,
    KOHYA,
    DIFFUSERS,
    COMFYUI,
    PEFT_LORA,
)


def understand(header: Header) -> tuple[Dialect, Claims]:
    """Find a file's dialect and have it claim every tensor.

    Raises:
        AdapterError: If no dialect recognises the file, or a tensor is left that none of its rules
            claims; names the tensor and says what it looks like.
    """
    dialect = next((d for d in DIALECTS if d.recognises(header)), None)
    if dialect is None:
        refuse_unclaimed(header, sorted(header.entries), whole=True)
    claims = dialect.claim(header)
    if dialect.names_of_base:
        _check_base(header, claims)
    used = {key for spec in claims.modules.values() for key in spec.keys}
    used |= {extra.key for extra in claims.extras.values()} | claims.ignored.keys()
    left = sorted(header.entries.keys() - used)
    if left:
        refuse_unclaimed(header, left, modules=claims.modules)
    return dialect, claims


def _check_base(header: Header, claims: Claims) -> None:
    """Recipes that read base weights need them, and whoever opens the adapter has to know."""
    if header.has_base:
        for spec in claims.modules.values():
            _check_shape(header, spec)
        return
    for name, spec in claims.modules.items():
        if spec.recipe.needs_base:
            raise AdapterError(
                f"{header.adapter}: {name} changes its weight by an amount that depends on the "
                "base weight",
                "name the base model: lora-merge convert --base DIR",
            )


def _check_shape(header: Header, spec: ModuleSpec) -> None:
    """A module that is changed has to be there, with the factors' widths either way round."""
    # A tied head is not stored, and experts may be, in one tensor or apart.
    if spec.parameter is not None or spec.name == "lm_head" or is_expert_module(spec.name):
        return
    shape = header.base_shape(spec.name)
    if shape is None:
        raise AdapterError(
            f"{header.adapter}: the base has no weight for {spec.name}",
            "name the adapter's own base model; if only the names differ, --rename FROM=TO",
        )
    sizes = (shape[0], prod(shape[1:]))
    if sizes not in ((spec.d_out, spec.d_in), (spec.d_in, spec.d_out)):
        raise AdapterError(
            f"{header.adapter}: {spec.name} changes a {spec.d_out} x {spec.d_in} weight, the "
            f"base's is {list(shape)}",
            "name the adapter's own base model",
        )
