"""The dialect of PEFT's other tuners: `peft_type` in the config says which."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from lora_merge.adapters.config import AdapterConfig
from lora_merge.adapters.dialects.dialect import Claims, Dialect, Header
from lora_merge.adapters.dialects.grouping import Group
from lora_merge.adapters.dialects.peft_whole import whole_parameters
from lora_merge.adapters.dialects.tuners import (
    full_rank,
    low_rank,
    rotations,
    sparse,
    spectral,
    with_base,
)
from lora_merge.adapters.dialects.tuners.settings import Settings
from lora_merge.adapters.dialects.tuners.sort import sort_keys
from lora_merge.adapters.forms import ExtraSpec, ModuleSpec


@dataclass(frozen=True)
class Tuner:
    """One tuner.

    Attributes:
        title: Its name.
        prefix: What the names of its tensors begin with.
        module: Reads one module.
    """

    title: str
    prefix: str
    module: Callable[[Group, Settings], ModuleSpec]


# By `peft_type`.
TUNERS: dict[str, Tuner] = {
    "LOHA": Tuner("LoHa", "hada_", low_rank.loha),
    "LOKR": Tuner("LoKr", "lokr_", low_rank.lokr),
    "VERA": Tuner("VeRA", "vera_", low_rank.vera),
    "PVERA": Tuner("PVeRA", "pvera_", low_rank.vera),
    "VBLORA": Tuner("VB-LoRA", "vblora_", low_rank.vblora),
    "UNILORA": Tuner("UniLoRA", "unilora_", low_rank.unilora),
    "TINYLORA": Tuner("TinyLoRA", "tinylora_", low_rank.tinylora),
    "DELORA": Tuner("DeLoRA", "delora_", low_rank.delora),
    "MISS": Tuner("MiSS", "miss_", low_rank.miss),
    "GRALORA": Tuner("GraLoRA", "gralora_", low_rank.gralora),
    "HRA": Tuner("HRA", "hra_", with_base.hra),
    "DEFT": Tuner("DEFT", "deft_", with_base.deft),
    "PSOFT": Tuner("PSOFT", "psoft_", with_base.psoft),
    "PEANUT": Tuner("PEANuT", "peanut_", with_base.peanut),
    "IA3": Tuner("IA3", "ia3_", full_rank.ia3),
    "HIRA": Tuner("HiRA", "hira_", full_rank.hira),
    "C3A": Tuner("C3A", "c3a_", spectral.c3a),
    "FOURIERFT": Tuner("FourierFT", "fourierft_", spectral.fourierft),
    "OFT": Tuner("OFT", "oft_", full_rank.oft),
    "SHIRA": Tuner("SHiRA", "shira_", sparse.shira),
    "WAVEFT": Tuner("WaveFT", "waveft_", spectral.waveft),
    "SUPERTUNING": Tuner("Super-Tuning", "supertuning_", sparse.supertuning),
    "PACA": Tuner("PaCA", "paca_", sparse.paca),
    "BOFT": Tuner("BOFT", "boft_", rotations.boft),
    "ROAD": Tuner("RoAd", "road_", rotations.road),
    "RANDLORA": Tuner("RandLoRA", "randlora_", rotations.randlora),
    "GLORA": Tuner("GLoRA", "glora_", full_rank.glora),
}


def _recognises(header: Header) -> bool:
    return header.config is not None and header.config.peft_type in TUNERS


def _claim(header: Header) -> Claims:
    config = header.said()
    tuner = TUNERS[config.peft_type]
    keys, shared, rest = sort_keys(header, tuner.prefix)
    settings = Settings(header, config, shared, len(keys))
    if config.peft_type == "UNILORA" and not keys:
        low_rank.unilora_without_indices(settings)
    if not keys:
        settings.refuse("no module has a tensor of this kind", "the file does not fit its config")
    modules = {
        module: tuner.module(Group(header, module, parts), settings)
        for module, parts in sorted(keys.items())
    }
    plain = _as_lora(config)
    is_whole = whole_parameters(plain, modules)
    extras = {
        name: ExtraSpec(name, key, *header.entries[key])
        for name, key in sorted(rest.items())
        if is_whole(name, key)
    }
    return Claims(plain, modules, extras)


def _as_lora(config: AdapterConfig) -> AdapterConfig:
    """The config of the LoRA that these deltas are: scaling and ranks stand in the modules."""
    bias = "lora_only" if config.bias.endswith("_only") else config.bias.lower()
    return replace(config, peft_type="LORA", r=None, rank_pattern={}, alpha_pattern={}, bias=bias)


PEFT_TUNERS = Dialect("peft-tuners", "a tuner of PEFT", _recognises, _claim)
