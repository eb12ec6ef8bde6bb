"""Tuners whose delta is low-rank once the base weight is multiplied in."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lora_merge.adapters.dialects.grouping import Group
from lora_merge.adapters.dialects.recipes import with_base
from lora_merge.adapters.dialects.recipes.units import Units, precise, scaled, with_core
from lora_merge.adapters.dialects.tuners.settings import Settings
from lora_merge.adapters.forms import ModuleSpec
from lora_merge.adapters.units import BaseWeight

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.nn.functional.relu,
    "gelu": torch.nn.functional.gelu,
    "silu": torch.nn.functional.silu,
    "swish": torch.nn.functional.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "linear": lambda x: x,
}


def hra(group: Group, settings: Settings) -> ModuleSpec:
    """HRA: Householder reflections of the input."""
    d_in, r = group.shape("hra_u", 2)
    d_out = _d_out(group, settings, d_in)
    units = partial(with_base.householder, orthogonal=bool(settings.said("apply_GS", False)))
    return _spec(group, ("hra_u",), units, d_out, d_in, r)


def deft(group: Group, settings: Settings) -> ModuleSpec:
    """DEFT, and PaRa, which only takes a subspace away."""
    d_out, r = group.shape("deft_P", 2)
    para = bool(settings.said("para", False))
    if para:
        d_in = settings.base_shape(group)[1]
    else:
        rows, d_in = group.shape("deft_R", 2)
        group.check(rows == r)
    alpha = settings.said("alpha")
    method = settings.said("decomposition_method", "relu")
    units = partial(_deft, method == "qr", float(alpha) / r if alpha else 1.0)
    parts = ("deft_P",) if para else ("deft_P", "deft_R")
    return _spec(group, parts, units, d_out, d_in, r)


def _deft(qr: bool, scale: float, p: Tensor, *r: Tensor, base: BaseWeight) -> Units:
    p = precise(p)
    left = torch.linalg.qr(p).Q if qr else p
    right = left if qr else p.relu()
    return with_base.removed(left, right, scale * precise(r[0]) if r else None, base=base)


def psoft(group: Group, settings: Settings) -> ModuleSpec:
    """PSOFT: an orthogonal core between the largest singular vectors of W."""
    shape = group.shape("psoft_R.weight")
    r = int(settings.said("r", 32))
    orthogonal = bool(settings.said("psoft_orth", True))
    group.check(shape == ((r * (r - 1) // 2,) if orthogonal else (r, r)))
    if settings.said("psoft_svd", "full") != "full":
        group.refuse("its bases are a randomised SVD of W", "they cannot be made again; leave it")
    if settings.said("ab_svd_init", "psoft_init") not in ("psoft_init", "pissa_init"):
        group.refuse("ab_svd_init is unknown", "update lora-merge")
    d_out, d_in = settings.base_shape(group)
    sides = {side: bool(settings.said(f"psoft_mag_{side}", True)) for side in "ba"}
    vectors = tuple(f"psoft_R.vector_{side}" for side, there in sides.items() if there)
    group.check(all(group.shape(vector) == (r,) for vector in vectors))
    units = partial(
        _psoft,
        r,
        orthogonal,
        _cayley_terms(settings),
        sides["b"],
        sides["a"],
    )
    return _spec(group, ("psoft_R.weight", *vectors), units, d_out, d_in, r)


def _cayley_terms(settings: Settings) -> tuple[int, float | None] | None:
    """Terms of the Neumann series and the bound of the norm, None for the exact inverse."""
    if not settings.said("use_cayley_neumann", False):
        return None
    eps = settings.said("cayley_neumann_eps")
    return int(settings.said("num_cayley_neumann_terms", 5)), None if eps is None else float(eps)


def _psoft(
    r: int,
    orthogonal: bool,
    terms: tuple[int, float | None] | None,
    rows: bool,
    columns: bool,
    weight: Tensor,
    *vectors: Tensor,
    base: BaseWeight,
) -> Units:
    """W_r (R - I) in W's own singular vectors; the split of the values between A and B cancels."""
    core = cayley(skew(precise(weight), r), terms) if orthogonal else precise(weight)
    trained = list(vectors)
    if rows:
        core = precise(trained.pop(0))[:, None] * core
    if columns:
        core = core * precise(trained.pop(0))
    u, s, vh = torch.linalg.svd(base.dense(), full_matrices=False)
    return with_core(Units(vh[:r], u[:, :r] * s[:r]), core - torch.eye(r))


def skew(upper: Tensor, size: int) -> Tensor:
    """A skew-symmetric matrix from the entries above its diagonal, shape (size (size - 1) / 2,)."""
    matrix = upper.new_zeros(size, size)
    row, column = torch.triu_indices(size, size, 1)
    matrix[row, column] = upper
    return matrix - matrix.mT


def cayley(q: Tensor, terms: tuple[int, float | None] | None) -> Tensor:
    """(I + Q)(I - Q)^-1, or as many terms of its Neumann series as PEFT takes."""
    eye = torch.eye(q.shape[-1], dtype=q.dtype)
    if terms is None:
        exact: Tensor = torch.linalg.solve(eye - q, eye + q, left=False)
        return exact
    count, bound = terms
    if bound is not None and float(q.norm()) > bound:
        q = q * (bound / (q.norm() + 1e-12))
    result, power = eye.clone(), eye
    for term in range(1, count):
        power = power @ q
        last = term == count - 1 and count > 2
        result = result + (power if last else 2 * power)
    return result


def peanut(group: Group, settings: Settings) -> ModuleSpec:
    """PEANuT: a small network applied to W's columns."""
    name = settings.said("act_fn", "relu")
    if name not in _ACTIVATIONS:
        group.refuse(f"act_fn {name!r} is not known here", "merge it into its base with PEFT")
    r, d_out = group.shape("peanut_A.weight", 2)
    depth = sum(part.startswith("peanut_encoders.") for part in group.keys)
    hidden = tuple(f"peanut_{kind}coders.{i}.weight" for kind in ("en", "de") for i in range(depth))
    group.check(group.shape("peanut_B.weight") == (d_out, r))
    group.check(all(group.shape(part) == (r, r) for part in hidden))
    rows, d_in = settings.base_shape(group)
    group.check(rows == d_out)
    return _spec(
        group,
        ("peanut_A.weight", "peanut_B.weight", *hidden),
        partial(_peanut, name, float(settings.said("scaling", 1.0))),
        d_out,
        d_in,
        r,
    )


def _peanut(
    name: str, scale: float, down: Tensor, up: Tensor, *hidden: Tensor, base: BaseWeight
) -> Units:
    half = len(hidden) // 2
    units = with_base.network(down, up, hidden[:half], hidden[half:], _ACTIVATIONS[name], base=base)
    return scaled(units, scale)


def _d_out(group: Group, settings: Settings, d_in: int) -> int:
    d_out, width = settings.base_shape(group)
    if width != d_in:
        group.refuse(f"the base weight is {d_out} x {width}", "name the right base model")
    return d_out


def _spec(
    group: Group, parts: tuple[str, ...], units: Callable[..., Any], d_out: int, d_in: int, r: int
) -> ModuleSpec:
    return group.spec(
        parts,
        units,
        d_out=d_out,
        d_in=d_in,
        rank=r,
        verdict="exact-with-base",
        needs_base=True,
    )
