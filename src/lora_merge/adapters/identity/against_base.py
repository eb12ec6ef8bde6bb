"""An adapter's modules against the base model that it is opened with: names, widths, experts."""

from collections.abc import Iterable
from math import prod

from lora_merge.adapters.base_weights import BaseModel
from lora_merge.adapters.forms import ModuleSpec
from lora_merge.adapters.identity.expert_names import expert_place
from lora_merge.errors import AdapterError

_OTHER_BASE = "name the adapter's own base model"


def check_base(adapter: str, modules: Iterable[ModuleSpec], base: BaseModel | None) -> None:
    """Every module that is changed has to be in the base, with the factors' widths.

    Raises:
        AdapterError: Naming the first that is not, and what comes near; without a base, the first
            whose delta depends on one.
    """
    for spec in modules:
        if base is None:
            if spec.recipe.needs_base:
                raise AdapterError(
                    f"{adapter}: {spec.name} changes its weight by an amount that depends "
                    "on the base weight",
                    "name the base model: --base DIR",
                )
        elif spec.form == "experts" or expert_place(spec.name):
            _check_experts(adapter, spec, base)
        elif spec.parameter is None and spec.name != "lm_head":  # a tied head is not stored
            _check_shape(adapter, spec, base)


def _check_experts(adapter: str, spec: ModuleSpec, base: BaseModel) -> None:
    stem, number, _ = expert_place(spec.name) or (spec.name.rpartition(".")[0], None, "")
    count = base.experts(stem)
    if count is None:
        raise AdapterError(
            f"{adapter}: the base has no experts below {stem}", _remedy(base.near(spec.name))
        )
    wanted = spec.num_experts if number is None else number + 1
    if wanted > count or (number is None and wanted != count):
        what = f"{wanted} experts" if number is None else f"expert {number}"
        raise AdapterError(f"{adapter}: {spec.name}: {what}, the base has {count}", _OTHER_BASE)


def _check_shape(adapter: str, spec: ModuleSpec, base: BaseModel) -> None:
    shape = base.shape(spec.name)
    if shape is None:
        raise AdapterError(
            f"{adapter}: the base has no weight for {spec.name}", _remedy(base.near(spec.name))
        )
    sizes = (shape[0], prod(shape[1:]))
    if sizes not in ((spec.d_out, spec.d_in), (spec.d_in, spec.d_out)):
        raise AdapterError(
            f"{adapter}: {spec.name} changes a {spec.d_out} x {spec.d_in} weight, the base's is "
            f"{list(shape)}",
            _OTHER_BASE,
        )


def _remedy(near: tuple[str, ...]) -> str:
    there = f"; it has {' and '.join(near)}" if near else ""
    return f"{_OTHER_BASE}; if only the names differ, --rename FROM=TO{there}"
