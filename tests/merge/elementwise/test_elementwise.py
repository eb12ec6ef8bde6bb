"""Elementwise rules against plain dense float64 code, PEFT and the laws they obey."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft.utils import merge_utils as peft_rules

from lora_merge.errors import MethodError
from lora_merge.linalg.random_bits import keep_threshold, random_bits
from lora_merge.merge.elementwise.blocks import Block, in_turn
from lora_merge.merge.elementwise.combine import combine, measure, merge_tensor
from lora_merge.merge.elementwise.rule import Rule, preset, rule_names

KEYS = (11, 22, 33, 44, 55)
WEIGHTS = (1.0, 0.5, -0.7, 1.9)
COMPATS = ("authors", "peft", "mergekit")


def tensors(seed=0, shape=(4, 9, 14)):
    random = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=random, dtype=torch.float64)


# --- the oracle: one adapter at a time, whole tensors, sorts and loops -------------------------


def dense_top(x, k):
    """Mask of the k largest magnitudes of a tensor without equal magnitudes."""
    mask = torch.zeros(x.numel(), dtype=torch.bool)
    mask[x.abs().flatten().argsort(descending=True)[:k]] = True
    return mask.reshape(x.shape)


def dense_sparse(rule, x, key):
    n = x.numel()
    if rule.density >= 1 and rule.trim >= 1:
        return x.clone()
    if rule.sparsify == "magnitude":
        out = x * dense_top(x, int(rule.density * n))
    elif rule.sparsify == "outliers":
        keep, top = int(rule.density * n), int(rule.gamma * n)
        top = min(top, n - keep)
        out = x * (dense_top(x, top + keep) & ~dense_top(x, top))
    elif rule.sparsify == "random":
        out = x.clone()
        if rule.density < 1:
            out = x * (random_bits(key, 0, tuple(x.shape)) < keep_threshold(rule.density))
        if rule.rescale == "probability":
            out = out / rule.density
        if rule.trim < 1:
            out = out * dense_top(out, int(rule.trim * n))
    elif rule.sparsify == "della":
        bits, out = random_bits(key, 0, tuple(x.shape)), torch.zeros_like(x)
        for row, line in enumerate(x):
            for rank, column in enumerate(line.abs().argsort().tolist()):
                p = rule.density - rule.epsilon + 2 * rule.epsilon * rank / (len(line) - 1)
                if bits[row, column] < keep_threshold(p):
                    scale = 1 / p if rule.rescale == "probability" else 1.0
                    out[row, column] = line[column] * scale
    else:
        out = x.clone()
    if rule.rescale == "l1":
        out = out * (x.abs().sum() / out.abs().sum())
    return out


def dense_merge(rule, xs, weights, keys):
    if rule.sparsify == "variance" and rule.density < 1:
        variance = torch.stack(list(xs)).var(dim=0, unbiased=False)
        mask = dense_top(variance, int(rule.density * int((variance > 0).sum())))
        parts = [x * mask for x in xs]
    else:
        parts = [dense_sparse(rule.of(i), x, keys[i]) for i, x in enumerate(xs)]
    shares = list(weights)
    if rule.energy_weights:
        squares = [float(part.square().sum()) for part in parts]
        shares = [w * s / sum(squares) for w, s in zip(weights, squares, strict=True)]
    merged = torch.zeros_like(parts[0])
    majority = dense_majority(rule, parts, shares)
    for place in product(*map(range, merged.shape)):
        entries = [float(part[place]) for part in parts]
        merged[place] = dense_entry(rule, entries, shares, majority)
    return merged


def dense_vote(rule, entries, shares):
    ballots = [
        e * (w if rule.elect_on == "weighted" else 1) for e, w in zip(entries, shares, strict=True)
    ]
    if rule.elect == "frequency":
        ballots = [(b > 0) - (b < 0) for b in ballots]
    return sum(ballots), ballots


def dense_majority(rule, parts, shares):
    total = 0
    for place in product(*map(range, parts[0].shape)):
        vote, _ = dense_vote(rule, [float(p[place]) for p in parts], shares)
        total += (vote > 0) - (vote < 0)
    return 1 if total >= 0 or rule.zero_sign == "plus" else -1


def dense_entry(rule, entries, shares, majority):
    counted = {"count": lambda w: 1, "weights": lambda w: w, "abs-weights": abs}.get(rule.divide_by)
    who = range(len(entries))
    if rule.elect != "none":
        vote, ballots = dense_vote(rule, entries, shares)
        sign = (vote > 0) - (vote < 0) or majority
        who = [i for i in who if ballots[i] * sign > 0]
    total = sum(shares[i] * entries[i] for i in who)
    divisor = sum(counted(shares[i]) for i in who) if counted else 1
    return total / divisor if divisor else total


# --- against the oracle and PEFT ---------------------------------------------------------------


@pytest.mark.parametrize("compat", COMPATS)
@pytest.mark.parametrize("name", rule_names())
def test_presets_equal_plain_dense_code(name, compat):
    rule = preset(name, compat=compat)
    x = tensors()
    merged = merge_tensor(rule, x, WEIGHTS, keys=KEYS[:4])
    torch.testing.assert_close(merged, dense_merge(rule, x, WEIGHTS, KEYS[:4]))


@given(
    sparsify=st.sampled_from(["none", "magnitude", "random", "della", "outliers", "variance"]),
    density=st.sampled_from([0.15, 0.3, 0.5, 0.85, 0.9, 1.0]),
    rescale=st.sampled_from(["none", "probability", "l1"]),
    elect=st.sampled_from(["none", "total", "frequency"]),
    elect_on=st.sampled_from(["unweighted", "weighted"]),
    zero_sign=st.sampled_from(["majority", "plus"]),
    divide_by=st.sampled_from(["none", "count", "weights", "abs-weights"]),
    energy_weights=st.booleans(),
    weights=st.lists(st.sampled_from([1.0, 0.5, -0.7, 2.0]), min_size=4, max_size=4),
    seed=st.integers(0, 99),
)
def test_any_mixture_of_options_equals_plain_dense_code(weights, seed, **options):
    if options["rescale"] == "l1" and options["sparsify"] == "variance":
        options["rescale"] = "none"  # the oracle knows no such thing
    x = tensors(seed, (4, 3, 7))
    x[1, 0], x[2] = -x[0, 0], x[3]  # exact ties and equal tensors
    x[:, 1, 2] = 0
    if options["sparsify"] in ("magnitude", "outliers", "variance"):
        x = tensors(seed, (4, 3, 7))  # the oracle cannot cut between equals
    rule = Rule(epsilon=0.1, **options)
    merged = merge_tensor(rule, x, weights, keys=KEYS[:4])
    expected = dense_merge(rule, x, weights, KEYS[:4])
    torch.testing.assert_close(merged, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("compat", COMPATS)
@pytest.mark.parametrize("name", [n for n in rule_names() if n != "sce"])
def test_adapters_with_rules_of_their_own_equal_plain_dense_code(name, compat):
    rule = preset(name, compat=compat, density=0.6, scope="tensor")
    further = {"della": {"epsilon": 0.4}, "breadcrumbs": {"gamma": 0.2}}.get(name, {})
    own = [
        rule,
        replace(rule, density=1.0),
        replace(rule, density=0.3),
        replace(rule, density=0.5, **further),
    ]
    rule = replace(rule, own=tuple(own))
    x = tensors()
    merged = merge_tensor(rule, x, WEIGHTS, keys=KEYS[:4])
    torch.testing.assert_close(merged, dense_merge(rule, x, WEIGHTS, KEYS[:4]))
    alone = replace(rule, own=())
    assert not torch.allclose(merged, merge_tensor(alone, x, WEIGHTS, keys=KEYS[:4]))


@pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
@pytest.mark.parametrize("elect", ["total", "frequency"])
def test_ties_and_magnitude_are_pefts(density, elect):
    x, weights = tensors().float(), torch.tensor(WEIGHTS)
    if density < 1:  # PEFT warns of density 1, and the suite takes warnings for errors
        theirs = peft_rules.ties(list(x), weights, density, elect)
        magnitude = peft_rules.magnitude_prune(list(x), weights, density)
    else:
        mask = peft_rules.calculate_majority_sign_mask(x, elect)
        theirs = peft_rules.disjoint_merge(x * weights[:, None, None], mask)
        magnitude = peft_rules.task_arithmetic(list(x), weights)
    ours = merge_tensor(preset("ties", compat="peft", density=density, elect=elect), x, WEIGHTS)
    torch.testing.assert_close(ours, theirs)
    ours = merge_tensor(preset("magnitude", compat="peft", density=density), x, WEIGHTS)
    torch.testing.assert_close(ours, magnitude)


def test_dare_is_pefts_when_the_dice_fall_the_same(monkeypatch):
    x, weights, keys = tensors().float(), torch.tensor(WEIGHTS), iter(KEYS * 2)

    def our_dice(tensor, density, rescale):
        kept = random_bits(next(keys), 0, tuple(tensor.shape)) < keep_threshold(density)
        return tensor * kept / density

    monkeypatch.setattr(peft_rules, "random_pruning", our_dice)
    for name, theirs in (("dare", peft_rules.dare_linear), ("dare-ties", peft_rules.dare_ties)):
        keys = iter(KEYS)
        rule = preset(name, compat="peft", density=0.4)
        ours = merge_tensor(rule, x, WEIGHTS, keys=KEYS[:4])
        torch.testing.assert_close(ours, theirs(list(x), weights, 0.4))


def in_mergekits_words(name, x, weights, keys, density, gamma, epsilon):
    """mergekit's published formulas, restated: sparsify, weigh, consensus, divide."""
    parts = []
    for one, key in zip(x, keys, strict=True):
        n, order = one.numel(), one.abs().flatten().argsort()
        mask = torch.zeros(n, dtype=x.dtype)
        bits = random_bits(key, 0, tuple(one.shape)).double() / 2**32 + 0.5  # uniform in [0, 1)
        if name in ("ties", "magnitude"):
            mask[order[n - int(density * n) :]] = 1
        elif name == "breadcrumbs":
            top = int(gamma * n)
            mask[order[n - int(density * n) - top : n - top]] = 1
        elif name in ("dare", "dare-ties"):
            mask = (bits < density).to(x.dtype)
        else:
            rank = one.abs().argsort(dim=1).argsort(dim=1) / (one.shape[1] - 1)
            mask = (bits < density - epsilon + 2 * epsilon * rank).to(x.dtype)
        part = one * mask.reshape(one.shape)
        if name in ("dare", "dare-ties", "della"):
            part = part * (one.abs().sum() / part.abs().sum())
        parts.append(part)
    w = torch.tensor(weights, dtype=x.dtype)[:, None, None]
    weighted = torch.stack(parts) * w
    if name not in ("ties", "dare-ties", "della"):
        return weighted.sum(dim=0)
    majority = torch.where(weighted.sum(dim=0) >= 0, 1, -1)
    agrees = weighted.sign() == majority
    divisor = (w * agrees).sum(dim=0)
    divisor[divisor == 0] = 1
    return (weighted * agrees).sum(dim=0) / (1 if name == "dare-ties" else divisor)


@pytest.mark.parametrize("name", [name for name in rule_names() if name != "sce"])
def test_compat_mergekit_is_mergekits_formula(name):
    x, epsilon = tensors(5, (4, 11, 13)), 0.15
    rule = preset(name, compat="mergekit", density=0.6)
    for weights in (WEIGHTS, (0.3, 1.0, 1.0, 0.7)):
        theirs = in_mergekits_words(name, x, weights, KEYS[:4], 0.6, rule.gamma, epsilon)
        torch.testing.assert_close(merge_tensor(rule, x, weights, keys=KEYS[:4]), theirs)


@pytest.mark.parametrize("top", [0.15, 0.5, 1.0])
def test_sce_is_fusechats_formula(top):
    x = tensors(6, (3, 8, 10))
    variance = x.var(dim=0, unbiased=False)
    kept = torch.ones_like(variance)
    if top < 1:
        smallest = variance.flatten().topk(int(top * variance.numel())).values[-1]
        kept = (variance >= smallest).to(x.dtype)
    deltas = x * kept
    shares = deltas.square().sum(dim=(1, 2), keepdim=True)
    agrees = deltas.sign() == torch.where(deltas.sum(dim=0) >= 0, 1, -1)
    divisor = (shares * agrees).sum(dim=0)
    theirs = (deltas * shares * agrees).sum(dim=0) / torch.where(divisor == 0, 1, divisor)
    ours = merge_tensor(preset("sce", density=top), x, [1, 1, 1])
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("name", ["ties", "dare-ties"])
def test_ties_is_the_authors_formula_on_the_whole_vector(name):
    """Trim the flattened vector, elect by the sum, zero sums to the majority, disjoint mean."""
    x = tensors(7, (5, 12, 15))
    x[1, 0] = -x[0, 0]
    x[2:, 0] = 0
    vectors = x.flatten(1)
    rule = preset(name)
    if name == "dare-ties":  # MergeLM drops and rescales first, then does TIES with a trim of 80 %
        kept = [random_bits(key, 0, (12, 15)) < keep_threshold(0.5) for key in KEYS]
        vectors = vectors * torch.stack(kept).flatten(1) / 0.5
    kth = vectors.abs().topk(int(0.2 * vectors.shape[1]), dim=1).values[:, -1:]
    vectors = vectors * (vectors.abs() >= kth)
    signs = vectors.sum(dim=0).sign()
    signs[signs == 0] = signs.sum().sign()
    agrees = torch.where(signs > 0, vectors > 0, vectors < 0)
    mean = (vectors * agrees).sum(dim=0) / agrees.sum(dim=0).clamp(min=1)
    merged = merge_tensor(rule, x, [1.0] * 5, keys=KEYS)
    torch.testing.assert_close(merged.flatten(), mean)


# --- laws ----------------------------------------------------------------------------------------

_rules = st.builds(
    lambda name, compat, scope: preset(name, compat=compat, scope=scope),
    st.sampled_from(rule_names()),
    st.sampled_from(COMPATS),
    st.sampled_from(["tensor", "row"]),
)


@given(rule=_rules, heights=st.lists(st.integers(1, 6), min_size=1, max_size=5), order=st.randoms())
def test_blocks_of_any_height_in_any_order_give_the_same_bits(rule, heights, order):
    x = tensors(3, (3, sum(heights), 19)).float()
    x[1, 0] = -x[0, 0]  # a tied vote asks for the majority
    x[2, 0] = 0
    whole = merge_tensor(rule, x, WEIGHTS[:3], keys=KEYS[:3])
    blocks, row = [], 0
    for height in heights:
        part = x[:, row : row + height]
        blocks.append(Block(part, WEIGHTS[:3], KEYS[:3], (0, 1, 2), row))
        row += height
    order.shuffle(blocks)
    statistics = measure(rule, in_turn(lambda: blocks), 3)
    merged = {block.row: combine(rule, block, statistics) for block in blocks}
    assert torch.equal(torch.cat([merged[row] for row in sorted(merged)]), whole)


@given(rule=_rules, order=st.permutations(range(4)))
def test_adapters_in_any_order_give_the_same_result(rule, order):
    x = tensors()
    merged = merge_tensor(rule, x, WEIGHTS, keys=KEYS[:4])
    other = merge_tensor(
        rule, x[list(order)], [WEIGHTS[i] for i in order], keys=[KEYS[i] for i in order]
    )
    torch.testing.assert_close(other, merged)


@given(rule=_rules, place=st.integers(0, 4))
def test_weight_zero_is_absence(rule, place):
    x = tensors(1, (5, 6, 8))
    weights = [1.0, 0.5, -0.7, 1.9, 0.3]
    weights[place] = 0.0
    rest = [i for i in range(5) if i != place]
    merged = merge_tensor(rule, x, weights, keys=KEYS)
    without = merge_tensor(rule, x[rest], [weights[i] for i in rest], keys=[KEYS[i] for i in rest])
    assert torch.equal(merged, without)


@given(rule=_rules, factor=st.sampled_from([0.25, 3.0]))
def test_scaling_all_adapters_scales_the_result(rule, factor):
    x = tensors()
    merged = merge_tensor(rule, x, WEIGHTS, keys=KEYS[:4])
    torch.testing.assert_close(
        merge_tensor(rule, x * factor, WEIGHTS, keys=KEYS[:4]), merged * factor
    )


@given(rule=_rules, factor=st.sampled_from([0.25, 3.0]))
def test_scaling_all_weights_scales_the_result_unless_weights_are_normalised(rule, factor):
    x = tensors()
    merged = merge_tensor(rule, x, WEIGHTS, keys=KEYS[:4])
    scaled = merge_tensor(rule, x, [w * factor for w in WEIGHTS], keys=KEYS[:4])
    expected = merged if rule.divide_by in ("weights", "abs-weights") else merged * factor
    torch.testing.assert_close(scaled, expected)


@given(st.sampled_from(["magnitude", "dare", "breadcrumbs"]), st.sampled_from(COMPATS))
def test_density_1_is_the_plain_sum(name, compat):
    x = tensors()
    merged = merge_tensor(preset(name, compat=compat, density=1.0), x, WEIGHTS, keys=KEYS[:4])
    expected = torch.einsum("n,nij->ij", torch.tensor(WEIGHTS, dtype=torch.float64), x)
    torch.testing.assert_close(merged, expected)


@given(st.sampled_from(["magnitude", "ties", "dare", "dare-ties", "della", "breadcrumbs", "sce"]))
def test_one_adapter_at_density_1_comes_out_as_it_went_in(name):
    x = tensors(2, (1, 5, 6))
    changes = {"trim": 1.0} if name == "dare-ties" else {}
    rule = preset(name, density=1.0, scope="tensor", **changes)
    torch.testing.assert_close(merge_tensor(rule, x, [1.0], keys=KEYS[:1]), x[0])


def test_ties_of_an_adapter_and_its_negative_weight_cancel():
    x = tensors()[:1].expand(2, -1, -1)
    for name in ("magnitude", "ties"):
        merged = merge_tensor(preset(name, scope="tensor"), x, [1.0, -1.0])
        assert merged.abs().max() < 1e-15


def test_exact_ties_follow_the_majority_of_elected_signs():
    x = torch.tensor([[[2.0, -3.0, -1.0, 0.0]], [[-2.0, -3.0, -1.0, 0.0]]])
    rule = Rule(elect="total", divide_by="count")
    assert merge_tensor(rule, x, [1, 1]).tolist() == [[-2.0, -3.0, -1.0, 0.0]]
    plus = Rule(elect="total", divide_by="count", zero_sign="plus")
    assert merge_tensor(plus, x, [1, 1]).tolist() == [[2.0, -3.0, -1.0, 0.0]]


def test_breadcrumbs_without_outliers_is_magnitude_pruning():
    x = tensors()
    for gamma in (0.0, 0.001):  # 0.001 * 126 entries: no outlier either
        crumbs = merge_tensor(preset("breadcrumbs", density=0.4, gamma=gamma), x, WEIGHTS)
        assert crumbs.count_nonzero() > 0
        assert torch.equal(crumbs, merge_tensor(preset("magnitude", density=0.4), x, WEIGHTS))


def test_della_ranks_equal_magnitudes_by_column_in_both_precisions():
    x = torch.tensor([0.5, -2.0, 0.0, 2.0, -0.5, 0.5, 1e-40, 2.0]).repeat(1, 3000, 1)
    rule = preset("della", density=0.6, epsilon=0.39, compat="peft")
    merged = [merge_tensor(rule, y, [1.0], keys=[9]) for y in (x, x.double())]
    torch.testing.assert_close(merged[0].double(), merged[1], rtol=1e-6, atol=1e-30)
    kept = merged[0].ne(0).double().mean(dim=0)
    order = x[0, 0].abs().sort(stable=True).indices
    ramp = torch.linspace(0.21, 0.99, 8, dtype=torch.float64)
    assert ((kept[order] - ramp).abs() < 5 * (0.25 / 3000) ** 0.5)[1:].all()  # the first is 0


def test_della_keeps_rows_of_one_column_with_the_density():
    x = torch.ones(1, 20_000, 1, dtype=torch.float64)
    merged = merge_tensor(preset("della", density=0.7), x, [1.0], keys=[5])
    kept = merged.count_nonzero().item() / 20_000
    assert merged.isfinite().all()
    assert abs(kept - 0.7) < 5 * (0.21 / 20_000) ** 0.5
    torch.testing.assert_close(merged.max().item(), 1 / 0.7)


@pytest.mark.parametrize("name", ["dare", "della"])
def test_dropping_is_unbiased(name):
    x = tensors(0, (1, 2, 40)).expand(1, -1, -1)
    rule = Rule(preset(name).sparsify, density=0.6, rescale="probability")
    draws = torch.stack([merge_tensor(rule, x, [1.0], keys=[key]) for key in range(4000)])
    spread = x[0].abs() * (0.47 / 0.53 / 4000) ** 0.5  # della's least keep probability is 0.53
    assert ((draws.mean(dim=0) - x[0]).abs() < 5 * spread).all()


def test_a_mask_stays_with_its_adapter():
    x = tensors()
    rule = Rule("random", density=0.5)
    alone = merge_tensor(rule, x[2:3], [1.0], keys=[33])
    others = merge_tensor(rule, x[:2], [1.0, 1.0], keys=[11, 22])
    together = merge_tensor(rule, x[:3], [1.0, 1.0, 1.0], keys=[11, 22, 33])
    torch.testing.assert_close(together, others + alone)


@pytest.mark.parametrize("name", rule_names())
def test_single_rows_single_columns_and_zeros_stay_finite(name):
    for shape in ((2, 1, 7), (2, 7, 1), (2, 1, 1)):
        for x in (tensors(0, shape), torch.zeros(shape)):
            for scope in ("tensor", "row"):
                merged = merge_tensor(preset(name, scope=scope), x, [1.0, -1.0], keys=KEYS[:2])
                assert merged.isfinite().all()


@pytest.mark.parametrize(
    "options",
    [
        {"density": 1.5},
        {"density": float("nan")},
        {"sparsify": "della", "density": 0.9, "epsilon": 0.2},
        {"sparsify": "random", "density": 0.0},
        {"sparsify": "magnitude", "density": 0.5, "trim": 0.5},
        {"sparsify": "variance", "scope": "global"},
    ],
)
def test_meaningless_options_are_refused(options):
    with pytest.raises(MethodError):
        Rule(**options)


def test_a_rule_that_draws_asks_for_keys():
    with pytest.raises(MethodError, match="random"):
        merge_tensor(preset("dare"), tensors(), WEIGHTS)
