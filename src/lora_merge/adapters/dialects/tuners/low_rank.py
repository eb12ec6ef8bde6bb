"""Tuners whose delta is low-rank and needs no base weight (two of them need its shapes)."""

from functools import partial

from torch import Tensor

from lora_merge.adapters.dialects.diffusion import forms
from lora_merge.adapters.dialects.grouping import Group
from lora_merge.adapters.dialects.recipes import blocks, gather
from lora_merge.adapters.dialects.recipes.units import Units, joined, product
from lora_merge.adapters.dialects.tuners.full_rank import miss_bat
from lora_merge.adapters.dialects.tuners.settings import Settings
from lora_merge.adapters.forms import ModuleSpec

_PROJECTIONS = "save it again with save_projection=True, which stores it"


def loha(group: Group, settings: Settings) -> ModuleSpec:
    """LoHa: as in LyCORIS, with alpha in the config."""
    return forms.loha(group, settings.scaling(group.module))


def lokr(group: Group, settings: Settings) -> ModuleSpec:
    """LoKr: as in LyCORIS, but alpha / r holds even where both factors are whole."""
    return forms.lokr(group, settings.scaling(group.module))


def vera(group: Group, settings: Settings) -> ModuleSpec:
    """VeRA, and PVeRA's mean: slices of one frozen pair between two trained diagonals."""
    name = "pvera" if "pvera_lambda_b" in group else "vera"
    if settings.said("sample_at_inference", False):
        settings.refuse("it samples its weights at every call", "set sample_at_inference to false")
    a, b = (settings.key(f"{name}_{half}", _PROJECTIONS) for half in "AB")
    shape_a, shape_b = settings.header.entries[a][1], settings.header.entries[b][1]
    d_out, d_in = settings.base_shape(group)
    r = shape_b[1]
    doubled = 2 * r if name == "pvera" else r
    group.check(group.shape(f"{name}_lambda_b", 1) == (d_out,) and d_in <= shape_a[1])
    group.check(group.shape(f"{name}_lambda_d", 1) == (doubled,) == shape_a[:1])
    group.check(d_out <= shape_b[0])
    return group.spec(
        (a, b, f"{name}_lambda_d", f"{name}_lambda_b"),
        partial(_vera, d_in),
        d_out=d_out,
        d_in=d_in,
        rank=r,
    )


def _vera(d_in: int, a: Tensor, b: Tensor, d: Tensor, scale: Tensor) -> Units:
    return gather.frozen_pair(a, b, d, scale, d_in)


def vblora(group: Group, settings: Settings) -> ModuleSpec:
    """VB-LoRA, with its logits or with the k best of them (`save_only_topk_weights`)."""
    bank = settings.key("vblora_vector_bank", "the file is incomplete; download it again")
    length = settings.header.entries[bank][1][1]
    saved = "vblora_logits_A_topk_indices" in group
    ends = ("_topk_indices", "_topk_weights") if saved else ("",)
    parts = tuple(f"vblora_logits_{half}{end}" for half in "AB" for end in ends)
    (r, tiles_in, _), (tiles_out, r_b, _) = (
        group.shape(f"vblora_logits_{half}{ends[0]}", 3) for half in "AB"
    )
    group.check(r == r_b)
    if saved:
        for half in "AB":
            *tiles, k = group.shape(f"vblora_logits_{half}_topk_indices")
            group.check(group.shape(f"vblora_logits_{half}_topk_weights") == (*tiles, k - 1))
    return group.spec(
        (bank, *parts),
        _vblora_saved if saved else partial(_vblora, int(settings.said("topk", 2))),
        d_out=tiles_out * length,
        d_in=tiles_in * length,
        rank=r,
    )


def _vblora(topk: int, bank: Tensor, logits_a: Tensor, logits_b: Tensor) -> Units:
    of_a, of_b = (gather.bank_weights(logits, topk) for logits in (logits_a, logits_b))
    return gather.vector_bank(bank, of_a, of_b)


def _vblora_saved(bank: Tensor, ia: Tensor, wa: Tensor, ib: Tensor, wb: Tensor) -> Units:
    of_a, of_b = (gather.bank_weights_saved(i, w) for i, w in ((ia, wa), (ib, wb)))
    return gather.vector_bank(bank, of_a, of_b)


def unilora(group: Group, settings: Settings) -> ModuleSpec:
    """UniLoRA, if its indices were saved: they come from the order in which modules were made."""
    theta = settings.key("unilora_theta_d", "the file is incomplete; download it again")
    parts = [f"unilora_{what}_{half}" for half in "AB" for what in ("indices", "scales")]
    r, d_in = group.shape("unilora_indices_A", 2)
    d_out, r_b = group.shape("unilora_indices_B", 2)
    group.check(r == r_b and group.shape("unilora_scales_A") == (r, d_in))
    group.check(group.shape("unilora_scales_B") == (d_out, r))
    return group.spec((theta, *parts), gather.indexed, d_out=d_out, d_in=d_in, rank=r)


def unilora_without_indices(settings: Settings) -> None:
    """Refuse a UniLoRA file that holds its vector alone."""
    settings.refuse(
        "the indices of its shared vector are not in the file, and depend on the order in which "
        "PEFT met the modules",
        "load it in PEFT and save it again with save_indices=True",
    )


def tinylora(group: Group, settings: Settings) -> ModuleSpec:
    """TinyLoRA: the frozen SVD of W, a core mixed from saved projections by a shared vector."""
    if "tinylora_P" not in group:
        settings.refuse("the projections are not in the file", _PROJECTIONS)
    tying = float(settings.said("weight_tying", 0.0))
    groups = max(1, round(settings.modules * (1 - tying)))
    missing = "the file is incomplete; download it again"
    vectors = [settings.key(f"tinylora_v.{group}", missing) for group in range(groups)]
    (u, r, columns), (r_a, d_in) = group.shape("tinylora_P", 3), group.shape("tinylora_A", 2)
    d_out, r_b = group.shape("tinylora_B", 2)
    group.check(r == columns == r_a == r_b)
    group.check(all(settings.header.entries[key][1] == (u,) for key in vectors))
    return group.spec(
        ("tinylora_A", "tinylora_B", "tinylora_P", *vectors),
        partial(
            gather.tied_core,
            seed=int(settings.said("projection_seed", 42)),
            modules=settings.modules,
            where=f"{settings.header.adapter}: {group.module}",
        ),
        d_out=d_out,
        d_in=d_in,
        rank=r,
    )


def delora(group: Group, settings: Settings) -> ModuleSpec:
    """DeLoRA: normalised units of one trained strength."""
    (r, d_in), (d_out, r_b) = group.shape("delora_A", 2), group.shape("delora_B", 2)
    if "delora_w_norm" not in group:
        group.refuse("delora_w_norm is missing", "save it with a recent PEFT, which stores it")
    group.check(r == r_b and group.shape("delora_w_norm") == (d_in,))
    group.check(group.shape("delora_lambda") == (1,))
    parts = ("delora_A", "delora_B", "delora_lambda", "delora_w_norm")
    return group.spec(parts, gather.normalised, d_out=d_out, d_in=d_in, rank=r)


def miss(group: Group, settings: Settings) -> ModuleSpec:
    """MiSS and its "mini" form: one block, repeated along the input."""
    if settings.said("init_weights", True) == "bat":
        return miss_bat(group, settings)
    r, width = group.shape("miss_block", 2)
    d_out, d_in = settings.base_shape(group)
    group.check(d_out % width == 0 and (width == d_out or settings.said("init_weights") == "mini"))
    units = partial(blocks.tiled, d_out=d_out, d_in=d_in)
    return group.spec(("miss_block",), units, d_out=d_out, d_in=d_in, rank=r)


def gralora(group: Group, settings: Settings) -> ModuleSpec:
    """GraLoRA: a grid of low-rank cells, and in its hybrid form a plain LoRA beside it."""
    (k, width, r), (k_b, r_b, height) = group.shape("gralora_A", 3), group.shape("gralora_B", 3)
    group.check(k == k_b and r == r_b and r % k == 0)
    parts: tuple[str, ...] = ("gralora_A", "gralora_B")
    extra = 0
    if "gralora_A_general.weight" in group:
        extra, d_in = group.shape("gralora_A_general.weight", 2)
        group.check(d_in == k * width)
        group.check(group.shape("gralora_B_general.weight") == (k * height, extra))
        parts += ("gralora_A_general.weight", "gralora_B_general.weight")
    return group.spec(
        parts,
        _gralora,
        d_out=k * height,
        d_in=k * width,
        rank=k * r + extra,
        scaling=float(settings.said("alpha", 64)) / (r + extra),
    )


def _gralora(a: Tensor, b: Tensor, *general: Tensor) -> Units:
    cells = blocks.grid(a, b)
    return joined([cells, product(*general)]) if general else cells
