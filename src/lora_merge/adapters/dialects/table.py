"""All dialects. The first that recognises a file reads it."""

from lora_merge.adapters.dialects.dialect import Claims, Dialect, Header
from lora_merge.adapters.dialects.diffusion.dialects import COMFYUI, DIFFUSERS, KOHYA
from lora_merge.adapters.dialects.language.gguf import GGUF
from lora_merge.adapters.dialects.language.mlx import MLX
from lora_merge.adapters.dialects.language.tinker import TINKER
from lora_merge.adapters.dialects.language.torchtune import TORCHTUNE
from lora_merge.adapters.dialects.looks_like import refuse_unclaimed
from lora_merge.adapters.dialects.peft_lora import PEFT_LORA
from lora_merge.adapters.dialects.tuners.dialect import PEFT_TUNERS
from lora_merge.adapters.dialects.tuners.flora import FLORA
from lora_merge.adapters.dialects.tuners.lora_variants import LORA_VARIANTS
from lora_merge.adapters.dialects.tuners.lora_xs import LORA_XS
from lora_merge.adapters.identity.against_base import check_base

# PEFT's own names are also those of its many variants, so its row stands last.
DIALECTS: tuple[Dialect, ...] = (
    PEFT_TUNERS,
    LORA_VARIANTS,
    LORA_XS,
    FLORA,
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
        check_base(header.adapter, claims.modules.values(), header.base)
    used = {key for spec in claims.modules.values() for key in spec.keys}
    used |= {extra.key for extra in claims.extras.values()} | claims.ignored.keys()
    left = sorted(header.entries.keys() - used)
    if left:
        refuse_unclaimed(header, left, modules=claims.modules)
    return dialect, claims
