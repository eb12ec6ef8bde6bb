"""How LyCORIS, kohya and their kin store one module, and the same forms in PEFT.

| form  | tensors | delta |
| --- | --- | --- |
| LoRA, LoCon | lora_down, lora_up | up down |
| with a middle | lora_down (r, in), lora_mid (r, r, *kernel), lora_up | Tucker |
| LoHa | hada_w1_a/b, hada_w2_a/b, in Tucker form with hada_t1/t2 | entrywise product |
| LoKr | lokr_w1 or _a/_b, lokr_w2 or _a/_b, with lokr_t2 | Kronecker product |
| GLoRA | a1, a2, b1, b2 | b1 b2 + W a1 a2 |

Alpha is divided by the rank that the tensors have; shapes decide everything, never a setting.
"""

from functools import partial
from math import prod

from torch import Tensor

from lora_merge.adapters.dialects.grouping import Group
from lora_merge.adapters.dialects.recipes.products import (
    khatri_rao,
    kronecker,
    kronecker_truncated,
    tucker,
)
from lora_merge.adapters.dialects.recipes.units import Units, precise, product, split
from lora_merge.adapters.dialects.recipes.with_base import right_path
from lora_merge.adapters.forms import ModuleSpec
from lora_merge.adapters.units import BaseWeight
from lora_merge.linalg.factors import frobenius


def lora(group: Group, scaling: float | None = None) -> ModuleSpec:
    """LoRA or LoCon; `scaling` overrides what alpha says."""
    down, up = group.shape("lora_down"), group.shape("lora_up")
    group.check(len(down) >= 2 and len(up) >= 2 and prod(up[2:]) == 1)
    d_out, r = up[0], down[0]
    scaling = group.alpha(r) if scaling is None else scaling
    if "lora_mid" in group:
        mid = group.shape("lora_mid")
        group.check(len(mid) > 2 and mid[:2] == (up[1], r) and prod(down[2:]) == 1)
        return group.spec(
            ("lora_mid", "lora_up", "lora_down"),
            _tucker_of_convolutions,
            d_out=d_out,
            d_in=down[1] * prod(mid[2:]),
            rank=up[1],
            scaling=group.alpha(r),
            kernel=mid[2:],
        )
    group.check(up[1] == r)
    return group.spec(
        ("lora_down", "lora_up"),
        None,
        d_out=d_out,
        d_in=prod(down[1:]),
        rank=r,
        scaling=scaling,
        kernel=down[2:],
    )


def _tucker_of_convolutions(mid: Tensor, up: Tensor, down: Tensor) -> Units:
    return tucker(mid, up.flatten(1), down.flatten(1))


def loha(group: Group, scaling: float | None = None) -> ModuleSpec:
    """LoHa. Tucker factors are stored transposed: (r, out) and (r, in)."""
    names = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    a1, b1, a2, b2 = (group.shape(name, 2) for name in names)
    if "hada_t1" not in group and "hada_t2" not in group:
        group.check(a1[1] == b1[0] and a2[1] == b2[0] and a1[0] == a2[0] and b1[1] == b2[1])
        return group.spec(
            names,
            _loha,
            d_out=a1[0],
            d_in=b1[1],
            rank=a1[1] * a2[1],
            scaling=group.alpha(b1[0]) if scaling is None else scaling,
        )
    t1, t2 = group.shape("hada_t1"), group.shape("hada_t2")
    group.check(len(t1) > 2 and t1[2:] == t2[2:] and t1[:2] == (a1[0], b1[0]))
    group.check(t2[:2] == (a2[0], b2[0]) and a1[1] == a2[1] and b1[1] == b2[1])
    return group.spec(
        ("hada_t1", "hada_w1_a", "hada_w1_b", "hada_t2", "hada_w2_a", "hada_w2_b"),
        _loha_tucker,
        d_out=a1[1],
        d_in=b1[1] * prod(t1[2:]),
        rank=a1[0] * a2[0],
        scaling=group.alpha(b1[0]) if scaling is None else scaling,
        kernel=t1[2:],
    )


def _loha(a1: Tensor, b1: Tensor, a2: Tensor, b2: Tensor) -> Units:
    return khatri_rao(product(b1, a1), product(b2, a2))


def _loha_tucker(t1: Tensor, a1: Tensor, b1: Tensor, t2: Tensor, a2: Tensor, b2: Tensor) -> Units:
    return khatri_rao(tucker(t1, a1.mT, b1), tucker(t2, a2.mT, b2))


def lokr(group: Group, scaling: float | None = None) -> ModuleSpec:
    """LoKr. A factor kept whole has as many units as its smaller side.

    Where the file's reader asked for a rank below the exact one, the best part of that rank comes
    from the factors' own SVDs.
    """
    (first, (p, q), k1, r1, _) = _kronecker_factor(group, "lokr_w1")
    (second, (m, n), k2, r2, kernel) = _kronecker_factor(group, "lokr_w2")
    if scaling is None:
        r = r2 or r1
        scaling = group.alpha(r) if r is not None else 1.0
    exact, cut = k1 * k2, group.header.rank
    short = cut is not None and cut < exact
    return group.spec(
        first + second,
        partial(_lokr, len(first), cut if short else None),
        d_out=p * m,
        d_in=q * n,
        rank=cut if short and cut is not None else exact,
        scaling=scaling,
        kernel=kernel,
        verdict="approximate" if short else "exact",
        whole_norm=partial(_lokr_norm, len(first)) if short else None,
    )


def _kronecker_factor(
    group: Group, name: str
) -> tuple[tuple[str, ...], tuple[int, int], int, int | None, tuple[int, ...]]:
    """(parts, shape as a matrix, units, rank or None if whole, kernel) of one factor."""
    if name in group:
        whole = group.shape(name)
        group.check(len(whole) >= 2)
        shape = (whole[0], prod(whole[1:]))
        return (name,), shape, min(shape), None, whole[2:]
    a, b = group.shape(f"{name}_a", 2), group.shape(f"{name}_b", 2)
    core = name.replace("_w", "_t")
    if core in group:
        t = group.shape(core)
        group.check(len(t) > 2 and t[:2] == (a[0], b[0]))
        parts = (core, f"{name}_a", f"{name}_b")
        return parts, (a[1], b[1] * prod(t[2:])), a[0], b[0], t[2:]
    group.check(a[1] == b[0])
    return (f"{name}_a", f"{name}_b"), (a[0], b[1]), a[1], b[0], ()


def _lokr(first: int, cut: int | None, *tensors: Tensor) -> Units:
    one, two = _factor(tensors[:first]), _factor(tensors[first:])
    return kronecker(one, two) if cut is None else kronecker_truncated(one, two, cut)


def _lokr_norm(first: int, *tensors: Tensor) -> float:
    """The norm of a Kronecker product is the product of its factors' norms."""
    one, two = _factor(tensors[:first]), _factor(tensors[first:])
    return frobenius(one.delta()) * frobenius(two.delta())


def _factor(tensors: tuple[Tensor, ...]) -> Units:
    if len(tensors) == 1:
        return split(precise(tensors[0]).flatten(1))
    if len(tensors) == 2:
        return product(tensors[1], tensors[0])
    return tucker(tensors[0], tensors[1].mT, tensors[2])


def glora(group: Group, scaling: float | None = None) -> ModuleSpec:
    """GLoRA, which needs W in one product; files of its first version have the halves swapped."""
    if "bm.weight" in group:
        group.refuse("a GLoRA convolution in Tucker form", "leave this module out")
    names = ("a1.weight", "a2.weight", "b1.weight", "b2.weight")
    shapes = [group.shape(name) for name in names]
    if any(prod(shape[2:]) != 1 for shape in shapes):
        group.refuse("GLoRA of a convolution wider than 1 x 1", "leave this module out")
    a1, a2, b1, b2 = (shape[:2] for shape in shapes)
    if not a1[1] == a2[0] == b1[1] == b2[0]:
        names = ("a2.weight", "a1.weight", "b2.weight", "b1.weight")
        a1, a2, b1, b2 = a2, a1, b2, b1
    group.check(a1[1] == a2[0] and b1[1] == b2[0] and a1[0] == a2[1] == b2[1])
    return group.spec(
        names,
        _glora,
        d_out=b1[0],
        d_in=a1[0],
        rank=b1[1] + a1[1],
        scaling=group.alpha(b1[1]) if scaling is None else scaling,
        kernel=shapes[0][2:],
        verdict="exact-with-base",
        needs_base=True,
    )


def _glora(a1: Tensor, a2: Tensor, b1: Tensor, b2: Tensor, *, base: BaseWeight) -> Units:
    return right_path(product(a2, a1), product(b2, b1), base=base)
