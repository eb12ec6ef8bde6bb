"""Every method against plain dense float64 code."""

import pytest
import torch
from dense import (
    dc_merge,
    iso_c,
    karcher,
    mean,
    model_stock,
    multislerp,
    robustmerge,
    slerp,
    total,
    truncated,
    tsv,
    wudi_loss,
    wudi_output,
)
from dense import pico as dense_pico
from dense import svc as dense_svc
from merging import merge_one
from torch import Tensor

from builders import random_stack
from lora_merge.adapters.rank_stack import RankStack
from lora_merge.errors import MethodError
from lora_merge.merge.methods.registry import find_method

WEIGHTS = (0.7, 1.3, -0.4)
SHARES = (0.7, 1.3, 0.4)


def deltas_of(stack: RankStack) -> list[Tensor]:
    return [stack.of_adapter(owner).delta() for owner in stack.adapters]


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-9) -> None:
    scale = float(expected.norm())
    assert float((actual.double() - expected).norm()) <= tolerance * max(scale, 1e-12)


@pytest.mark.parametrize("shape", [(14, 11), (30, 40)], ids=["R-above-d", "R-below-d"])
@pytest.mark.parametrize(
    ("method", "oracle", "weights"),
    [
        ("task-arithmetic", total, WEIGHTS),
        ("cat", total, WEIGHTS),
        ("svd", total, WEIGHTS),
        ("mean", mean, SHARES),
        ("fedavg", mean, SHARES),
        ("multislerp", multislerp, SHARES),
        ("karcher", karcher, SHARES),
        ("model-stock", model_stock, SHARES),
        ("tsv", tsv, WEIGHTS),
        ("core-tsv", tsv, WEIGHTS),
        ("iso-c", iso_c, WEIGHTS),
        ("core-iso", iso_c, WEIGHTS),
    ],
)
def test_agrees_with_dense_code(method, oracle, weights, shape) -> None:
    stack = random_stack((4, 6, 5), *shape)
    merged = merge_one(stack, method, weights=weights)
    expected = oracle(deltas_of(stack), list(weights))
    close(merged, expected, 1e-8)


@pytest.mark.parametrize("shape", [(14, 11), (30, 40)], ids=["R-above-d", "R-below-d"])
@pytest.mark.parametrize("smoothing", ["flat", "linear", "none"])
@pytest.mark.parametrize("density", [None, 0.02, 0.5])
def test_dc_merge_agrees_with_dense_code(shape, smoothing, density) -> None:
    stack = random_stack((4, 6, 5), *shape)
    parameters = {"smoothing": smoothing, "density": density}
    found = merge_one(stack, "dc-merge", weights=WEIGHTS, parameters=parameters)
    close(found, dc_merge(deltas_of(stack), WEIGHTS, smoothing, density), 1e-8)


def test_slerp_agrees_with_dense_code() -> None:
    stack = random_stack((4, 6), 30, 40)
    close(
        merge_one(stack, "slerp", weights=(0.7, 1.3)),
        slerp(deltas_of(stack), [0.7, 1.3]),
    )
    halfway = merge_one(stack, "slerp", parameters={"t": 0.5})
    close(halfway, slerp(deltas_of(stack), [1.0, 1.0]))


def test_model_stock_of_related_adapters() -> None:
    """Adapters of one task have a cosine, so that the shrinkage is not the clamp."""
    base = random_stack((4,), 30, 40)
    stacks = [random_stack((4,), 30, 40, seed=seed) for seed in (1, 2, 3)]
    factors = [(base.down + 0.3 * s.down, base.up + 0.3 * s.up, 1.0) for s in stacks]
    stack = RankStack.of(factors)
    merged = merge_one(stack, "model-stock")
    expected = model_stock(deltas_of(stack), [1.0, 1.0, 1.0])
    assert 0.3 < float(expected.norm() / mean(deltas_of(stack), [1.0] * 3).norm()) < 0.99
    close(merged, expected)


@pytest.mark.parametrize("method", ["svd", "tsv", "iso-c"])
@pytest.mark.parametrize("rank", [1, 3, 7])
def test_cut_is_the_best_of_its_rank(method, rank) -> None:
    stack = random_stack((4, 6, 5), 30, 40)
    deltas = deltas_of(stack)
    merged = merge_one(stack, method, rank=rank, weights=WEIGHTS)
    if method == "iso-c":  # a flat spectrum has no best cut: the sum's leading directions are it
        close(merged, iso_c(deltas, list(WEIGHTS), rank))
        return
    close(merged, truncated({"svd": total, "tsv": tsv}[method](deltas, list(WEIGHTS)), rank))


@pytest.mark.parametrize("side", ["input", "output"])
def test_wudi_reaches_the_loss_of_an_optimiser(side) -> None:
    stack = random_stack((6, 6, 6), 14, 12)  # row and column spaces overlap: no exact solution
    deltas = deltas_of(stack)
    found = merge_one(stack, "wudi", parameters={"side": side, "ridge": 1e-9})
    x = sum(deltas).clone().requires_grad_()
    optimiser = torch.optim.LBFGS(
        [x], max_iter=2000, tolerance_grad=1e-12, history_size=50, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = wudi_loss(x, deltas, side)
        loss.backward()
        return loss

    optimiser.step(closure)
    best = float(wudi_loss(x.detach(), deltas, side))
    assert best > 1e-3
    assert float(wudi_loss(found, deltas, side)) == pytest.approx(best, rel=1e-6)


def test_wudi_on_both_sides_is_a_stationary_point() -> None:
    stack = random_stack((6, 6, 6), 14, 12)
    deltas = deltas_of(stack)
    x = merge_one(stack, "wudi", parameters={"side": "both", "ridge": 1e-9}).requires_grad_()
    (wudi_loss(x, deltas, "input") + wudi_loss(x, deltas, "output")).backward()
    assert float(x.grad.norm()) < 1e-5


@pytest.mark.parametrize("side", ["input", "output"])
def test_wudi_reproduces_adapters_on_independent_subspaces(side) -> None:
    stack = random_stack((2, 3, 2), 30, 40)
    found = merge_one(stack, "wudi", parameters={"side": side, "ridge": 1e-10})
    assert float(wudi_loss(found, deltas_of(stack), side)) < 1e-12


@pytest.mark.parametrize("side", ["input", "output"])
def test_wudi_cut_beats_the_plain_cut_in_its_own_error(side) -> None:
    stack = random_stack((6, 6, 6), 30, 40)
    deltas = deltas_of(stack)
    options = {"side": side, "ridge": 1e-6}
    losses = [
        float(
            wudi_loss(
                merge_one(stack, "wudi", rank=5, parameters={**options, "compress": compress}),
                deltas,
                side,
            )
        )
        for compress in ("metric", "frobenius")
    ]
    assert losses[0] < 0.95 * losses[1]


@pytest.mark.parametrize("shape", [(14, 11), (30, 40)], ids=["R-above-d", "R-below-d"])
@pytest.mark.parametrize("rank", [None, 5])
def test_wudi_iso_agrees_with_dense_code(shape, rank) -> None:
    stack = random_stack((4, 6, 5), *shape)
    found = merge_one(stack, "wudi-iso", rank=rank, weights=WEIGHTS)
    close(found, wudi_output(deltas_of(stack), WEIGHTS, ridge=0.01, beta=0.25, rank=rank))


@pytest.mark.parametrize("side", ["input", "output", "both"])
def test_wudi_flattens_the_spectrum_and_keeps_the_norm(side) -> None:
    stack = random_stack((4, 6, 5), 30, 40)
    steep, half, flat = (
        merge_one(stack, "wudi", rank=6, parameters={"side": side, "beta": beta})
        for beta in (0.0, 0.5, 1.0)
    )
    values = torch.linalg.svdvals(steep)[:6]
    for merged, power in ((half, 0.5), (flat, 0.0)):
        found = torch.linalg.svdvals(merged)
        ratio = found[:6] / values**power
        assert float(found[6]) < 1e-9 and float(ratio.max() / ratio.min()) == pytest.approx(1)
        assert float(merged.norm()) == pytest.approx(float(steep.norm()))


def test_ctm_holds_more_energy_than_any_other_subspaces() -> None:
    """At its optimum each side's subspace is the best for the other's."""
    stack = random_stack((4, 6, 5), 30, 40)
    options = {"beta": 1.0, "tolerance": 1e-14, "iterations": 5000}
    merged = merge_one(stack, "ctm", rank=5, parameters=options)
    u, s, vh = torch.linalg.svd(merged)
    assert float(s[5]) < 1e-9 * float(s[0])
    x = torch.stack(deltas_of(stack))
    left, right = u[:, :5], vh[:5].mT
    close(merged, left @ left.mT @ x.sum(dim=0) @ right @ right.mT)
    best_left = torch.linalg.eigh(sum(d @ right @ right.mT @ d.mT for d in x)).eigenvectors[:, -5:]
    held = float((left.mT @ x @ right).square().sum())
    assert held == pytest.approx(float((best_left.mT @ x @ right).square().sum()), rel=1e-6)
    plain = merge_one(stack, "svd", rank=5)
    pu, _, pvh = torch.linalg.svd(plain)
    assert held > float((pu[:, :5].mT @ x @ pvh[:5].mT).square().sum())


@pytest.mark.parametrize("inner", ["iso-c", "tsv"])
def test_ctm_with_another_method_inside(inner) -> None:
    stack = random_stack((4, 6, 5), 30, 40)
    at_full_rank = merge_one(stack, "ctm", parameters={"inner": inner})
    close(at_full_rank, merge_one(stack, inner), 1e-7)


def test_iso_cts_has_a_flat_spectrum_and_every_task_in_it() -> None:
    stack = random_stack((4, 6, 5), 30, 40)
    merged = merge_one(stack, "iso-cts", rank=10)
    s = torch.linalg.svdvals(merged)
    assert torch.allclose(s[:10], s[0].expand(10)) and float(s[10]) < 1e-9
    # Each task's strongest direction beyond the common space is held almost whole.
    u = torch.linalg.svd(total(deltas_of(stack), [1.0] * 3)).U
    common = u[:, :7]
    for delta in deltas_of(stack):
        rest = delta - common @ common.mT @ delta
        first = torch.linalg.svd(rest).U[:, 0]
        basis = torch.linalg.svd(merged).U[:, :10]
        assert float((basis.mT @ first).norm()) > 0.9


def test_linear_factors_is_peft_formula_with_cross_terms() -> None:
    stack = random_stack((3, 3), 14, 11, scales=(0.5, 2.0))
    a, b = (stack.of_adapter(i) for i in (0, 1))
    wa, wb = 0.7 * 0.5, -0.4 * 2.0
    up = abs(wa) ** 0.5 * a.up + abs(wb) ** 0.5 * b.up
    down = abs(wa) ** 0.5 * a.down - abs(wb) ** 0.5 * b.down
    close(merge_one(stack, "linear-factors", weights=(0.7, -0.4)), up @ down)


def test_robustmerge_agrees_with_plain_code() -> None:
    stack = random_stack((5, 5, 5), 24, 32)
    weights = (0.7, 1.3, -0.4)
    factors = [
        (part.down, w * float(part.scale[0]) * part.up)
        for w, part in zip(weights, (stack.of_adapter(i) for i in range(3)), strict=True)
    ]
    close(merge_one(stack, "robustmerge", weights=weights), robustmerge(factors))


def test_aligned_mean_undoes_permutations_and_signs() -> None:
    one = random_stack((4,), 14, 11)
    order = torch.tensor([2, 0, 3, 1])
    signs = torch.tensor([1.0, -1.0, -1.0, 1.0], dtype=torch.float64)
    twin = (one.down[order] * signs[:, None] * 3.0, one.up[:, order] * signs / 3.0, 1.0)
    stack = RankStack.of([(one.down, one.up, 1.0), twin])
    close(merge_one(stack, "aligned-mean", weights=(3.0, 1.0)), one.delta())
    far = merge_one(stack, "linear-factors", weights=(0.75, 0.25))
    assert float((far - one.delta()).norm()) > 0.5 * float(one.delta().norm())


@pytest.mark.parametrize("method", ["aligned-mean", "karcher", "model-stock"])
def test_weights_that_cancel_are_no_shares(method) -> None:
    stack = random_stack((3, 3, 3))
    with pytest.raises(MethodError, match=r"layers.0.proj: the weights add up to 0"):
        merge_one(stack, method, weights=(0.1, 0.2, -0.3))  # 2.8e-17 in floating point


@pytest.mark.parametrize("method", ["task-arithmetic", "tsv", "lego"])
def test_pico_before_a_method(method) -> None:
    stack = random_stack((4, 6, 5), 30, 40)
    parts = [stack.of_adapter(i) for i in range(3)]
    ups = dense_pico([p.up * p.scale for p in parts])
    changed = RankStack.of([(p.down, up, 1.0) for p, up in zip(parts, ups, strict=True)])
    if method == "lego":  # scalings are part of what it clusters; here they are all 1
        stack = RankStack.of([(p.down, p.up * p.scale, 1.0) for p in parts])
    close(merge_one(stack, method, semantics={"pico": True}), merge_one(changed, method), 1e-7)


@pytest.mark.parametrize("method", ["task-arithmetic", "tsv", "lego"])
def test_svc_after_a_method(method) -> None:
    stack = random_stack((4, 6, 5), 30, 40)
    merged = merge_one(stack, method)
    calibrated = merge_one(stack, method, semantics={"svc": True})
    close(calibrated, dense_svc(merged, deltas_of(stack)), 1e-7)


@pytest.mark.parametrize("how", ["mean", "weighted-mean"])
def test_restored_norm(how) -> None:
    stack = random_stack((4, 6, 5), 30, 40)
    norms = [float(d.norm()) for d in deltas_of(stack)]
    shares = [1 / 3] * 3 if how == "mean" else [abs(w) / 2.4 for w in WEIGHTS]
    wanted = sum(s * n for s, n in zip(shares, norms, strict=True))
    merged = merge_one(stack, "svd", weights=WEIGHTS, semantics={"restore_norm": how})
    assert float(merged.norm()) == pytest.approx(wanted)
    doubled = {"restore_norm": how, "scale": 2.0}
    merged = merge_one(stack, "svd", weights=WEIGHTS, semantics=doubled)
    assert float(merged.norm()) == pytest.approx(2 * wanted)


def test_equalised_norms() -> None:
    stack = random_stack((4, 6, 5), 30, 40)
    deltas = deltas_of(stack)
    mean_norm = sum(float(d.norm()) for d in deltas) / 3
    equal = [d * mean_norm / d.norm() for d in deltas]
    merged = merge_one(stack, "svd", weights=WEIGHTS, semantics={"norm_equalise": True})
    close(merged, total(equal, WEIGHTS))


@pytest.mark.parametrize("method", ["linear-factors", "robustmerge", "aligned-mean"])
def test_methods_on_factors_refuse_mixed_ranks(method) -> None:
    with pytest.raises(MethodError, match="ranks differ"):
        merge_one(random_stack((3, 4)), method)


def test_slerp_refuses_three() -> None:
    with pytest.raises(MethodError, match="two adapters"):
        merge_one(random_stack((3, 4, 2)), "slerp")


@pytest.mark.parametrize("method", ["karcher", "multislerp"])
def test_cancelling_directions_are_refused(method) -> None:
    one = random_stack((3,))
    stack = RankStack.of([(one.down, one.up, 1.0), (one.down, -one.up, 1.0)])
    with pytest.raises(MethodError, match="cancel"):
        merge_one(stack, method)


def test_shared_factors_do_not_grow_the_rank() -> None:
    one, two = random_stack((3,)), random_stack((3,), seed=1)
    shared_a = RankStack.of([(one.down, one.up, 2.0), (one.down, two.up, 0.5)])
    shared_b = RankStack.of([(one.down, one.up, 2.0), (two.down, one.up, 0.5)])
    for stack in (shared_a, shared_b):
        merged = merge_one(stack, "fedavg", as_stack=True, weights=(1.0, 3.0))
        assert merged.num_units == 3
        close(merged.delta(), mean(deltas_of(stack), [1.0, 3.0]))


def test_names_and_aliases() -> None:
    assert find_method("linear") is find_method("task_arithmetic")
    with pytest.raises(MethodError, match="no method 'tvs'") as caught:
        find_method("tvs")
    assert "tsv" in caught.value.remedy


@pytest.mark.parametrize("mu", [0.0, 1.0, 1e9])
def test_np_lora_takes_the_styles_inputs_from_the_content(mu: float) -> None:
    stack = random_stack((4, 3), 20, 24, seed=3)
    content, style = (stack.of_adapter(i).delta().double() for i in (0, 1))
    _, _, vh = torch.linalg.svd(style)
    projection = mu / (1 + mu) * vh[:3].mT @ vh[:3]
    expected = style + content - content @ projection
    merged = merge_one(stack, "np-lora", parameters={"mu": mu})
    torch.testing.assert_close(merged.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("how", ["flat", "linear"])
def test_smoothing_keeps_directions_and_the_sum_of_the_singular_values(how: str) -> None:
    stack = random_stack((4, 3), 20, 24, seed=3)
    merged = merge_one(stack, "cat", semantics={"smooth": how}).double()
    expected = torch.zeros_like(merged)
    for owner in stack.adapters:
        u, s, vh = torch.linalg.svd(stack.of_adapter(owner).delta().double(), full_matrices=False)
        rank = int((s > 1e-5 * s[0]).sum())
        rho = min(5.0, float(s[0] / s[rank - 1])) if how == "linear" else 1.0
        line = torch.linspace(rho, 1, rank, dtype=torch.float64)
        values = line * s[:rank].sum() / line.sum()
        expected += (u[:, :rank] * values) @ vh[:rank]
    torch.testing.assert_close(merged, expected, rtol=1e-4, atol=1e-5)
