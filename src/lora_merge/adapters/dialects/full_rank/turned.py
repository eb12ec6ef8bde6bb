"""LyCORIS's OFT and BOFT, kohya's OFT, which turn the rows of W in blocks, and LyCORIS's IA3.

| form | tensors | delta |
| --- | --- | --- |
| OFT | oft_blocks (n, b, b), rescale, alpha | rescale R^T W - W, R block-diagonal |
| BOFT | oft_blocks (m, n, b, b), rescale, alpha | m such stages, each after a butterfly |
| IA3 | weight, on_input | rows or columns of W times weight |

R = (I + Q)(I - Q)^-1 with Q = blocks - blocks^T, and alpha times the number of rows bounds the norm
of all Q of a module together; an alpha of 0 bounds nothing.
"""

from functools import partial
from math import prod

import torch
from torch import Tensor

from lora_merge.adapters.dialects.full_rank.asked import dense_spec, refuse_unasked
from lora_merge.adapters.dialects.grouping import Group
from lora_merge.adapters.dialects.recipes.units import precise
from lora_merge.adapters.forms import ModuleSpec
from lora_merge.adapters.units import BaseWeight


def oft(group: Group, scaling: float | None = None) -> ModuleSpec:
    """OFT or BOFT; `scaling` has no meaning here."""
    why = "OFT turns the base weight"
    refuse_unasked(group, why)
    blocks = group.shape("oft_blocks", 3, 4)
    shape, kernel = _base_shape(group)
    size = blocks[-1]
    stages = blocks[0] if len(blocks) == 4 else 0
    group.check(blocks[-2] == size and blocks[-3] * size == shape[0])
    if stages:  # the last butterfly crosses 2^stages halves of a block
        group.check(size % 2 == 0 and shape[0] % (size * 2 ** (stages - 1)) == 0)
    parts: tuple[str, ...] = ("oft_blocks",)
    if "rescale" in group:
        group.check(prod(group.shape("rescale")) == shape[0])
        parts += ("rescale",)
    delta = partial(_turned, shape[0] * _constraint(group))
    return dense_spec(group, why, parts, delta, shape, kernel=kernel, needs_base=True)


def _constraint(group: Group) -> float:
    """The bound on Q's norm by row, 0 for none."""
    bound = group.header.scalar(group.keys["alpha"]) if "alpha" in group else 0.0
    if not 0 <= bound < 1e15:
        group.refuse(f"its constraint is {bound}", "correct its alpha")
    if bound == 0 and group.header.metadata.get("ss_network_module") == "networks.oft":
        group.refuse("its constraint is 0, by which sd-scripts turns nothing", "leave it out")
    return bound


def _turned(bound: float, blocks: Tensor, *rescale: Tensor, base: BaseWeight) -> Tensor:
    q = precise(blocks) - precise(blocks).mT
    norm = float(q.norm()) + 1e-8
    if 0 < bound < norm:
        q = q * (bound / norm)
    eye = torch.eye(q.shape[-1], dtype=q.dtype)
    turns = torch.linalg.solve(eye - q, eye + q, left=False)
    w = base.dense()
    turned = w.view(-1, q.shape[-1], w.shape[1])
    if turns.ndim == 3:
        turned = (turns.mT @ turned).reshape(w.shape)
    else:
        turned = w
        for stage, turn in enumerate(turns):
            turned = _butterfly(turn, stage, turned)
    return (turned if not rescale else precise(rescale[0]).reshape(-1, 1) * turned) - w


def _butterfly(turn: Tensor, stage: int, rows: Tensor) -> Tensor:
    """Turn blocks whose rows stand 2^stage half-blocks apart (LyCORIS's order of rows)."""
    size, width = turn.shape[-1], rows.shape[1]
    apart = 2**stage * size // 2
    gathered = rows.view(-1, 2, apart, width).transpose(1, 2).reshape(-1, size, width)
    turned = (turn @ gathered).reshape(-1, apart, 2, width)
    return turned.transpose(1, 2).reshape(rows.shape)


def ia3(group: Group, scaling: float | None = None) -> ModuleSpec:
    """IA3; `scaling` has no meaning here."""
    why = "IA3 rescales the base weight"
    refuse_unasked(group, why)
    shape, kernel = _base_shape(group)
    positions = prod(kernel)
    on_input = bool(group.header.scalar(group.keys["on_input"]))
    group.check(prod(group.shape("weight")) == (shape[1] // positions if on_input else shape[0]))
    delta = partial(_ia3, positions if on_input else 0)
    return dense_spec(group, why, ("weight",), delta, shape, kernel=kernel, needs_base=True)


def _ia3(positions: int, weight: Tensor, *, base: BaseWeight) -> Tensor:
    scale = precise(weight).flatten()
    if positions:
        return base.dense() * scale.repeat_interleave(positions)
    return base.dense() * scale[:, None]


def _base_shape(group: Group) -> tuple[tuple[int, int], tuple[int, ...]]:
    """(d_out, d_in) of the weight, kernel positions included, and the kernel."""
    shape = group.header.base_shape(group.module)
    if shape is None:
        group.refuse(
            "the width of this module is not stored",
            "name the base model, whose headers tell it: --base DIR",
        )
    group.check(len(shape) > 1)
    return (shape[0], prod(shape[1:])), tuple(shape[2:])
