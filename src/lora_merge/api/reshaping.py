"""One adapter in, one out: resize it, extract it from two models, fuse it into its base."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from lora_merge.adapters.access.coerce import AdaptersLike, open_adapter
from lora_merge.adapters.adapter import Adapter
from lora_merge.adapters.config import RankLayout
from lora_merge.adapters.in_memory import MadeAdapter
from lora_merge.adapters.measured.spectra import adapter_spectra
from lora_merge.api.looking import choose_ranks
from lora_merge.arguments import checked, nearest
from lora_merge.errors import MethodError
from lora_merge.files.checkpoint import open_checkpoint
from lora_merge.ranks.choose import RankPlan
from lora_merge.ranks.rule import RankRule
from lora_merge.reshape.convert import ConvertReport, plan_conversion
from lora_merge.reshape.convert import convert as write_converted
from lora_merge.reshape.diffusers_names import through_diffusers
from lora_merge.reshape.extract import ExtractReport
from lora_merge.reshape.extract import extract as extract_adapter
from lora_merge.reshape.fuse import FuseReport
from lora_merge.reshape.fuse import fuse as fuse_adapter
from lora_merge.reshape.resize import ResizeReport, plan_resize, resize_in_memory
from lora_merge.reshape.resize import resize as resize_adapter
from lora_merge.reshape.stored_units import nested_plan, prune_plan

Dtype = Literal["float64", "float32", "float16", "bfloat16"]
_WHOLE = 1 << 30  # every rank: `energy` then says where to cut
_CODES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}


@checked()
def resize(
    adapter: AdaptersLike,
    ranks: RankPlan | RankRule | str | int = "energy:0.95",
    out: str | os.PathLike[str] | None = None,
    *,
    nested: bool = False,
    min_rank: int = 1,
    max_rank: int | None = None,
    round_to: int = 1,
    layout: RankLayout = "per-module",
    dtype: Dtype | None = None,
    force: bool = False,
    jobs: int | None = None,
    on_module: Callable[[], None] | None = None,
) -> MadeAdapter[ResizeReport]:
    """Give an adapter new ranks: the best approximation of every delta at its rank.

    Args:
        adapter: One adapter, as `open_adapter` takes it.
        ranks: A plan of `choose_ranks` (made with the same adapter), a rank, a rule such as
            "energy:0.95" or "budget:x0.5", or "prune-gates" (AdaLoRA, SoRA).
        out: Directory to write as it is computed; default: the result stays in memory.
        nested: Keep the first units as stored (DyLoRA) instead of the singular ones.
        min_rank: Smallest rank, where `ranks` is no plan; 0 lets modules be dropped.
        max_rank: Largest rank, where `ranks` is no plan.
        round_to: Ranks become multiples of this, where `ranks` is no plan.
        layout: "per-module" writes rank_pattern; "uniform" pads with zeros.
        dtype: Of the factors; default: the adapter's.
        force: Replace an adapter directory that is there.
        jobs: Worker threads.
        on_module: Called after each module.

    Returns:
        The adapter, with the `report` of what truncation and rounding cost.

    Raises:
        MethodError: If the rule cannot be met.
        OutputError: If `out` cannot be written; nothing is left behind.

    Examples:
        >>> import lora_merge
        >>> small = lora_merge.resize("examples/adapters/upper", 4)
        >>> small.ranks()
        Counter({4: 14})
        >>> 0 < small.report.truncation < 1
        True
    """
    opened = open_adapter(adapter)
    found = adapter_spectra(opened, keep_cores=True, jobs=jobs)
    if isinstance(ranks, RankPlan):
        plan = ranks
        if set(plan.ranks) != set(opened.modules):
            raise MethodError("the plan is that of another adapter", "choose ranks for this one")
    elif ranks == "prune-gates":
        plan = prune_plan(opened, found, min_rank=min_rank)
    else:
        rule = str(ranks) if isinstance(ranks, int) else ranks
        plan = choose_ranks(found, rule, min_rank=min_rank, max_rank=max_rank, round_to=round_to)
    if nested:
        plan = nested_plan(opened, found, plan.ranks)
    output = plan_resize(opened, found, plan, dtype=_code(dtype), layout=layout)
    if out is None:
        return resize_in_memory(opened, found, plan, output, jobs=jobs, on_module=on_module)
    folder = Path(out)
    report = resize_adapter(
        opened, found, plan, output, folder, force=force, jobs=jobs, on_module=on_module
    )
    return MadeAdapter.of(Adapter.from_pretrained(folder), report)


@checked()
def extract(
    base: str | os.PathLike[str],
    tuned: str | os.PathLike[str],
    out: str | os.PathLike[str],
    rule: RankRule | str | int = "energy:0.95",
    *,
    max_rank: int = 64,
    denoise: bool = True,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    base_name: str | None = None,
    dtype: Dtype | None = None,
    layout: RankLayout = "uniform",
    seed: int = 0,
    force: bool = False,
    jobs: int | None = None,
    on_module: Callable[[], None] | None = None,
) -> MadeAdapter[ExtractReport]:
    """A LoRA of the differences between a model and its fine-tuned version.

    Args:
        base: Directory of the base model, in safetensors.
        tuned: Directory of the fine-tuned model.
        out: The directory to make.
        rule: A rank or a rule; energies are of the whole difference.
        max_rank: Triples computed per weight, and the largest rank.
        denoise: Cap ranks at the Gavish-Donoho threshold.
        include: Shell patterns of modules; default: every matrix but embeddings and heads.
        exclude: Shell patterns to leave out.
        base_name: Name of the base model for the config; default: its directory's.
        dtype: Of the factors; default: that of the tuned model.
        layout: "uniform" pads all modules to one rank; "per-module" writes rank_pattern.
        seed: Of the randomised SVD.
        force: Replace an adapter directory that is there.
        jobs: Worker threads.
        on_module: Called after each weight.

    Returns:
        The adapter that was written, with the `report` of what was extracted and what was not.

    Raises:
        MethodError: If no weight has changed, or none can be extracted.
        OutputError: If the directory cannot be written.

    Examples:
        >>> import lora_merge
        >>> report = lora_merge.fuse("examples/adapters/upper", "examples/base", "tuned")
        >>> made = lora_merge.extract("examples/base", "tuned", "extracted", 8)
        >>> max(made.ranks())
        8
    """
    checkpoint = open_checkpoint(Path(base))
    report = extract_adapter(
        checkpoint,
        open_checkpoint(Path(tuned)),
        Path(out),
        str(rule) if isinstance(rule, int) else rule,
        max_rank=max_rank,
        denoise=denoise,
        include=include,
        exclude=exclude,
        base_model=base_name or checkpoint.folder.name,
        dtype=_code(dtype),
        layout=layout,
        seed=seed,
        force=force,
        jobs=jobs,
        on_module=on_module,
    )
    return MadeAdapter.of(Adapter.from_pretrained(Path(out)), report)


@checked()
def fuse(
    adapter: AdaptersLike,
    base: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    weight: float = 1.0,
    force: bool = False,
    on_module: Callable[[], None] | None = None,
) -> FuseReport:
    """Write the base model with the adapter in it, shard by shard, in the base's dtype.

    Args:
        adapter: One adapter, as `open_adapter` takes it.
        base: Directory of the base model, in safetensors.
        out: The directory to make.
        weight: Multiplies the adapter's deltas.
        force: Replace a model or adapter directory that is there.
        on_module: Called after each module.

    Raises:
        AdapterError: If the adapter does not fit the base; nothing is written.
        OutputError: If the directory cannot be written; nothing is left behind.

    Examples:
        >>> import lora_merge
        >>> lora_merge.fuse("examples/adapters/upper", "examples/base", "fused").modules
        14
    """
    return fuse_adapter(
        open_adapter(adapter),
        Path(base),
        Path(out),
        weight=weight,
        force=force,
        on_module=on_module,
    )


@checked()
def convert(
    adapter: AdaptersLike,
    out: str | os.PathLike[str],
    *,
    to: str | None = None,
    base: str | os.PathLike[str] | None = None,
    rank: int | None = None,
    energy: float | None = None,
    component: str | None = None,
    pipeline: str | None = None,
    dtype: Dtype | None = None,
    force: bool = False,
    jobs: int | None = None,
    on_module: Callable[[], None] | None = None,
) -> ConvertReport:
    """Write an adapter in another format: exactly where its form is low-rank.

    Args:
        adapter: One adapter, as `open_adapter` takes it.
        out: The directory to make.
        to: Format to write; default: its own, or PEFT's.
        base: Directory of the base model, for forms and names that depend on it.
        rank: Cut every delta at this rank.
        energy: Cut every delta where this share of its squared norm is kept.
        component: Part of a pipeline that PEFT's names belong to: unet, ...
        pipeline: Rename by diffusers' converter: StableDiffusionXL, Flux, ...
        dtype: Of the factors; default: the adapter's.
        force: Replace a directory that lora-merge wrote.
        jobs: Worker threads.
        on_module: Called after each module.

    Raises:
        AdapterError: If a form needs `rank`, `energy` or `base`.
        OutputError: If `out` cannot be written; nothing is left behind.

    Examples:
        >>> import lora_merge
        >>> report = lora_merge.convert("examples/adapters/upper", "plain", to="peft")
        >>> lora_merge.open_adapter("plain").ranks()
        Counter({8: 14})
    """
    if rank is not None and energy is not None:
        raise MethodError("rank and energy are two cuts", "give one of them")
    opened = open_adapter(adapter, base=base, rank=rank if energy is None else _WHOLE)
    model = None if base is None else open_checkpoint(Path(base))
    if pipeline is not None:
        opened = through_diffusers(opened, pipeline, base=model)
    plan = plan_conversion(
        opened,
        to=to,
        component=component,
        base=model,
        rank=rank,
        energy=energy,
        dtype=_code(dtype),
    )
    return write_converted(plan, Path(out), force=force, jobs=jobs, on_module=on_module)


def _code(dtype: str | None) -> str | None:
    if dtype is not None and dtype not in _CODES:
        raise MethodError(f"dtype is {dtype!r}", nearest(dtype, _CODES))
    return _CODES[dtype] if dtype else None
