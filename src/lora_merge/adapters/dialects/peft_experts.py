"""Expert parameters in PEFT's files: which parameter a tensor adapts, and which way round it is.

PEFT (`target_parameters`) wraps a module once for each of its adapted parameters, in the order in
which the model defines them: the first is innermost, its keys have the most `base_layer`s, and the
order in the config means nothing. Since 0.19 an expert's A has as many columns as the expert has
inputs; 0.17 and 0.18 took the last two axes of the parameter for (in, out), which most models store
the other way round, so that there A has the outputs' width and the delta is transposed.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from torch import Tensor

from lora_merge.adapters.base_weights import BaseModel
from lora_merge.adapters.config import AdapterConfig
from lora_merge.adapters.dialects.peft_targets import is_targeted
from lora_merge.adapters.forms import ModuleSpec
from lora_merge.adapters.identity.expert_names import definition_order
from lora_merge.adapters.module_names import WRAPPED
from lora_merge.adapters.units import Units
from lora_merge.errors import AdapterError

_VERSION = re.compile(r"(\d+)\.(\d+)")
# The first PEFT that looks at how a model stores its experts.
_ORIENTED = (0, 19)
_READS_HIDDEN = re.compile(r"\.(q_proj|k_proj|v_proj|qkv_proj|gate_proj|up_proj)$")
# Models that store an expert as (in, out), by `model_type`.
INPUTS_FIRST = ("gpt_oss", "aria", "aria_text", "openai_privacy_filter")
_INNER = ("gate_up_proj", "gate_proj", "up_proj")


@dataclass(frozen=True)
class Wrapped:
    """An adapted parameter.

    Attributes:
        stem: The module that owns it.
        parameter: Its own name.
    """

    stem: str
    parameter: str

    @property
    def name(self) -> str:
        """Its path, which PEFT's patterns are matched against; a weight goes by its module."""
        return self.stem if self.parameter == "weight" else f"{self.stem}.{self.parameter}"


def find_parameters(
    paths: Iterable[str], config: AdapterConfig, adapter: str
) -> dict[str, Wrapped]:
    """Path of a PEFT wrapper → the parameter it adapts; paths that are modules are left out.

    Args:
        paths: Where the factors stand in the file.
        config: Says the target parameters.
        adapter: The adapter's name, for messages.

    Raises:
        AdapterError: If the wrappers of a module do not tell which parameter each adapts.
    """
    if not config.target_parameters:
        return {}
    levels: dict[str, dict[int, str]] = {}
    for path in paths:
        stem, depth = path, 0
        while stem.endswith(f".{WRAPPED}"):
            stem, depth = stem.removesuffix(f".{WRAPPED}"), depth + 1
        levels.setdefault(stem, {})[depth] = path
    found = {}
    for stem, nested in levels.items():
        leaves = _leaves(stem, nested, config)
        if not leaves:
            continue
        order = definition_order(leaves)
        if order is None or sorted(nested) != list(range(len(leaves))):
            raise AdapterError(
                f"{adapter}: {stem} has {len(nested)} adapted parameters in the file, and "
                f"target_parameters names {', '.join(sorted(leaves))}: which is which is not known",
                "leave this adapter out",
            )
        for depth, path in nested.items():
            found[path] = Wrapped(stem, order[-1 - depth])
    return found


def _leaves(stem: str, nested: Mapping[int, str], config: AdapterConfig) -> set[str]:
    """Names of the parameters of one module that the config adapts."""
    leaves = set()
    for target in config.target_parameters:
        parent, _, leaf = target.rpartition(".")
        # A bare name (what PEFT makes of Mixtral's) is any module's; modules adapted as such have
        # no wrapper inside.
        if f".{stem}".endswith(f".{parent}") if parent else not is_targeted(config, stem):
            leaves.add(leaf)
    # Of bare names a module has those that it has wrappers for, if they are all it could have.
    return leaves if len(leaves) >= len(nested) else set()


def turned(a: Tensor, b: Tensor, *, experts: int) -> Units:
    """Factors of the transposed deltas as those of the deltas.

    Args:
        a: (experts * r, out), expert-major.
        b: (in, r * experts), expert index fastest.
        experts: How many there are.
    """
    new_b = a.reshape(experts, -1, a.shape[1]).permute(2, 1, 0)
    new_a = b.reshape(b.shape[0], -1, experts).permute(2, 1, 0)
    return new_a.reshape(-1, b.shape[0]), new_b.reshape(a.shape[1], -1)


def turn_experts(
    specs: Sequence[ModuleSpec], config: AdapterConfig, adapter: str, base: BaseModel | None = None
) -> list[ModuleSpec]:
    """The modules of a file with every expert's delta as (out, in).

    Raises:
        AdapterError: If neither the version of PEFT nor the shapes tell which way round one is.
    """
    shapes = {spec.name: (spec.d_out, spec.d_in) for spec in specs}
    return [
        replace(
            spec,
            d_out=spec.d_in,
            d_in=spec.d_out,
            recipe=replace(spec.recipe, units=partial(turned, experts=spec.num_experts)),
        )
        if spec.form == "experts" and _is_turned(spec, shapes, config, adapter, base)
        else spec
        for spec in specs
    ]


def _is_turned(
    spec: ModuleSpec,
    shapes: Mapping[str, tuple[int, int]],
    config: AdapterConfig,
    adapter: str,
    base: BaseModel | None,
) -> bool:
    """Whether a file holds the factors of an expert's transposed delta."""
    version = _VERSION.match(str(config.raw.get("peft_version") or ""))
    if version and (int(version[1]), int(version[2])) >= _ORIENTED:
        return False
    if version and base is not None and base.kind:
        return base.kind not in INPUTS_FIRST
    verdict = _by_widths(spec, shapes)
    if verdict is None:
        said = f"by PEFT {version[0]}" if version else "by a PEFT that the config does not name"
        raise AdapterError(
            f"{adapter}: {spec.name} ({spec.d_out} x {spec.d_in}) was saved {said}, and versions "
            "before 0.19 stored the experts of some models transposed; the shapes do not tell",
            "if PEFT 0.19 or later trained it, say so in adapter_config.json: "
            '"peft_version": "0.19.0"; if an earlier one did, "0.18.0", and name the base: --base',
        )
    return verdict


def _by_widths(spec: ModuleSpec, shapes: Mapping[str, tuple[int, int]]) -> bool | None:
    """What the widths of other modules say: True for transposed, None for nothing."""
    rows, columns = spec.d_out, spec.d_in
    inner = spec.parameter in _INNER
    stem = spec.name.removesuffix(f".{spec.parameter}")
    up, down = shapes.get(f"{stem}.gate_up_proj"), shapes.get(f"{stem}.down_proj")
    if up and down:  # two halves of the hidden width, which down_proj reads
        if up[1] == down[0] and up[0] == 2 * down[1]:
            return False
        if up[0] == down[1] and up[1] == 2 * down[0]:
            return True
    hidden = {s[1] for n, s in shapes.items() if _READS_HIDDEN.search(n) and ".experts." not in n}
    if len(hidden) != 1 or rows == columns or not (inner or spec.parameter == "down_proj"):
        return None
    (width,) = hidden
    right, wrong = (columns, rows) if inner else (rows, columns)
    return {(True, False): False, (False, True): True}.get((right == width, wrong == width))
