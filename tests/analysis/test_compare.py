"""Pairwise statistics against dense float64 matrices, reference values and laws."""

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from builders import SHAPES, adapter_parts, make_adapter, random_stack
from lora_merge.adapters.adapter import Adapter, build_adapter
from lora_merge.adapters.config import parse_config
from lora_merge.adapters.rank_stack import RankStack
from lora_merge.analysis.compare import compare
from lora_merge.analysis.families import cluster_adapters, tree_of
from lora_merge.analysis.pairs import overlap
from lora_merge.analysis.pairs.matrices import PairMatrices
from lora_merge.analysis.pairs.overlap import PairTables, pair_tables
from lora_merge.analysis.pairs.plan import plan_comparison
from lora_merge.analysis.verdicts import judge
from lora_merge.errors import AdapterError, AlignmentError, MethodError
from lora_merge.files.tensor_file import TensorDict


def tables(stack: RankStack, count: int | None = None, samples: int = 500) -> PairTables:
    count = count or len(stack.adapters)
    return pair_tables(stack, count, samples=samples, seed=0, angles=True)


def dense(stack: RankStack, owner: int) -> torch.Tensor:
    return stack.of_adapter(owner).delta().double()


def bases(stack: RankStack, owner: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    u, s, vh = torch.linalg.svd(dense(stack, owner), full_matrices=False)
    rank = int((s > 1e-9 * s[0]).sum())
    return u[:, :rank], s[:rank], vh[:rank].mT


ranks = st.lists(st.integers(1, 5), min_size=2, max_size=4)


@given(ranks=ranks, seed=st.integers(0, 1000), d_out=st.integers(6, 30), d_in=st.integers(6, 30))
def test_tables_are_those_of_the_dense_deltas(ranks, seed, d_out, d_in):
    scales = [(-1) ** i * (1 + i) for i in range(len(ranks))]
    stack = random_stack(ranks, d_out, d_in, scales=scales, seed=seed)
    got = tables(stack)
    for i in range(len(ranks)):
        u, s, v = bases(stack, i)
        for j in range(len(ranks)):
            product = float((dense(stack, i) * dense(stack, j)).sum())
            assert float(got.products[i, j]) == pytest.approx(product, abs=1e-8)
            other_u, other_s, other_v = bases(stack, j)
            for mine, theirs, overlap_, cosine, chance, d in (
                (u, other_u, got.overlap_out, got.cosine_out, got.chance_out, d_out),
                (v, other_v, got.overlap_in, got.cosine_in, got.chance_in, d_in),
            ):
                cosines = torch.linalg.svdvals(mine.mT @ theirs)
                small = min(mine.shape[1], theirs.shape[1])
                phi = float(cosines.square().sum()) / small
                assert float(overlap_[i, j]) == pytest.approx(min(phi, 1), abs=1e-7)
                assert float(cosine[i, j]) == pytest.approx(min(float(cosines[0]), 1), abs=1e-7)
                assert int(got.dimensions[i, j]) == small
                every = (got.angles_out if theirs is other_u else got.angles_in)[i, j]
                torch.testing.assert_close(every[:small], cosines.clamp(0, 1), rtol=0, atol=1e-7)
                assert not bool(every[small:].any())
                largest = max(mine.shape[1], theirs.shape[1])
                assert float(chance[i, j]) == pytest.approx(min(largest / d, 1))
            if i != j:
                expected = interference([(u, s, v), (other_u, other_s, other_v)])
                assert float(got.interference[i, j]) == pytest.approx(expected, rel=1e-5)
                assert float(got.nuclear[i, j]) == pytest.approx(float(s.sum() + other_s.sum()))
    everyone = interference([bases(stack, i) for i in range(len(ranks))])
    assert got.total_interference == pytest.approx(everyone, rel=1e-5)


def interference(parts) -> float:
    """||(U^T U - I) S (V^T V - I)||_1 from concatenated dense bases."""
    u, v = torch.cat([p[0] for p in parts], 1), torch.cat([p[2] for p in parts], 1)
    s = torch.cat([p[1] for p in parts])
    identity = torch.eye(len(s), dtype=s.dtype)
    return float(((u.mT @ u - identity) @ torch.diag(s) @ (v.mT @ v - identity)).abs().sum())


def rank_one(pairs) -> RankStack:
    """Rank-one tasks sigma * e(left) e(right)^T, angles in the first two coordinates."""
    factors = []
    for sigma, left, right in pairs:
        b, a = torch.zeros(6, 1, dtype=torch.float64), torch.zeros(1, 5, dtype=torch.float64)
        b[0, 0], b[1, 0] = math.cos(left), math.sin(left)
        a[0, 0], a[0, 1] = math.cos(right), math.sin(right)
        factors.append((a, b, sigma))
    return RankStack.of(factors)


def test_reference_values_of_interference():
    assert float(tables(rank_one([(2, 0, 0), (3, 0, 0)])).interference[0, 1]) == pytest.approx(5)
    angled = tables(rank_one([(2, 0, 0), (3, 0.7, 0)]))
    assert float(angled.interference[0, 1]) == pytest.approx(5 * math.cos(0.7))
    orthogonal = tables(rank_one([(2, 0, 0), (3, math.pi / 2, 0)]))
    assert float(orthogonal.interference[0, 1]) == pytest.approx(0, abs=1e-12)
    three = tables(rank_one([(1, 0, 0)] * 3))
    assert three.total_interference == pytest.approx(12)
    assert float(angled.cosine_out[0, 1]) == pytest.approx(math.cos(0.7))
    assert float(angled.overlap_out[0, 1]) == pytest.approx(math.cos(0.7) ** 2)


def test_reference_value_of_the_cosine():
    b1, a1 = torch.tensor([[1.0], [0]]), torch.tensor([[1.0, 1]])
    b2, a2 = torch.tensor([[1.0], [1]]), torch.tensor([[1.0, 0]])
    got = tables(RankStack.of([(a1, b1, 1.0), (a2, b2, 1.0)]))
    assert float(got.products[0, 1]) == pytest.approx(1)
    assert got.products.diagonal().tolist() == pytest.approx([2, 2])


def test_many_units_take_the_fast_grams_with_the_same_result(monkeypatch):
    stack = random_stack([4, 3, 4, 2], 300, 200, seed=1, dtype=torch.float32)
    exact = tables(stack)
    monkeypatch.setattr(overlap, "EXACT_UNITS", 1)
    monkeypatch.setattr("lora_merge.linalg.factors._CHUNK_BYTES", 256)
    monkeypatch.setattr("lora_merge.linalg.factors._BLOCK", 5)
    fast = tables(random_stack([4, 3, 4, 2], 300, 200, seed=1, dtype=torch.float32))
    norms = exact.products.diagonal().sqrt()
    difference = (fast.products - exact.products) / (norms[:, None] * norms)
    assert float(difference.abs().max()) < 1e-6
    torch.testing.assert_close(fast.overlap_out, exact.overlap_out, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(fast.interference, exact.interference, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(fast.angles_out, exact.angles_out, rtol=0, atol=1e-5)
    torch.testing.assert_close(fast.angles_in, exact.angles_in, rtol=0, atol=1e-5)
    assert fast.total_interference == pytest.approx(exact.total_interference, rel=1e-4)
    brief = pair_tables(stack, 4, samples=500, seed=0)
    torch.testing.assert_close(brief.cosine_out, exact.cosine_out, rtol=2e-4, atol=1e-5)
    torch.testing.assert_close(brief.cosine_in, exact.cosine_in, rtol=2e-4, atol=1e-5)
    assert brief.angles_out is None


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12])
def test_fast_grams_do_not_depend_on_an_adapters_size(monkeypatch, scale):
    monkeypatch.setattr(overlap, "EXACT_UNITS", 1)
    stack = random_stack([3, 4, 2], 30, 20, seed=1)
    first = stack.owner == 0
    changed = RankStack(
        stack.down, torch.where(first, stack.up * scale, stack.up), stack.scale, stack.owner
    )
    one, two = tables(stack), tables(changed)
    for name in ("overlap_in", "cosine_in", "overlap_out", "cosine_out"):
        torch.testing.assert_close(getattr(one, name), getattr(two, name), rtol=0, atol=1e-5)


def test_bfloat16_adapters_are_compared_without_losing_digits(monkeypatch):
    opened = [adapter(str(i), seed=i // 2, r=4, dtype=torch.bfloat16) for i in range(4)]
    exact = compare(opened).total.cosine
    monkeypatch.setattr(overlap, "EXACT_UNITS", 1)
    assert float((compare(opened).total.cosine - exact).abs().max()) < 2e-6
    assert torch.get_float32_matmul_precision() == "highest"


class Bfloat16Products(TorchDispatchMode):
    """What AMX does to float32 products at precision "medium": inputs are rounded to bfloat16."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        aten = torch.ops.aten
        if function in (aten.mm.default, aten.bmm.default):
            args = [x.bfloat16().float() if x.dtype == torch.float32 else x for x in args]
        return function(*args, **(kwargs or {}))


def test_bfloat16_hardware_costs_no_digits(monkeypatch):
    stack = random_stack([4, 3, 4], 300, 200, seed=1, dtype=torch.bfloat16)
    monkeypatch.setattr(overlap, "EXACT_UNITS", 1)
    exact = pair_tables(stack, 3, samples=500, seed=0)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True}, raising=False)
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "medium")
    with Bfloat16Products():
        rounded = pair_tables(stack, 3, samples=500, seed=0)
    for name in ("products", "overlap_in", "cosine_in", "cosine_out", "interference", "conflicts"):
        torch.testing.assert_close(
            getattr(rounded, name), getattr(exact, name), rtol=1e-5, atol=1e-5, msg=name
        )
    assert rounded.total_interference == pytest.approx(exact.total_interference, rel=1e-5)


def test_sampled_conflicts_are_those_of_all_entries_within_their_error():
    stack = random_stack([3, 4], 40, 30, seed=2)
    one, two = dense(stack, 0), dense(stack, 1)
    two = stack.of_adapter(1)
    mixed = RankStack.of(
        [
            (stack.of_adapter(0).down, stack.of_adapter(0).up, 1.0),
            (
                torch.cat([stack.of_adapter(0).down, two.down]),
                torch.cat([stack.of_adapter(0).up, 0.3 * two.up], 1),
                1.0,
            ),
        ]
    )
    one, two = dense(mixed, 0), dense(mixed, 1)
    truth = float((one.sign() != two.sign()).double().mean())
    smaller = torch.minimum(one.abs(), two.abs())
    mass = float((smaller * (one * two < 0)).sum() / smaller.sum())
    got = tables(mixed, samples=8000)
    rate = float(got.conflicts[0, 1] / got.samples[0, 1])
    error = math.sqrt(truth * (1 - truth) / 8000)
    assert abs(rate - truth) < 4 * error
    assert float(got.conflict_mass[0, 1] / got.mass[0, 1]) == pytest.approx(mass, abs=0.03)


@pytest.mark.parametrize("factor", [1.0, 1e-6, 0.0, -1e-300])
def test_signs_are_those_of_the_sampled_entries(factor):
    stack = random_stack([3, 4, 2], 12, 15, scales=[1.0, factor, -2.0], seed=3)
    got = tables(stack, samples=300)
    generator = torch.Generator().manual_seed(0)
    rows, columns = (torch.randint(d, (300,), generator=generator) for d in (12, 15))
    entries = torch.stack([dense(stack, i)[rows, columns] for i in range(3)])
    smaller = torch.minimum(entries[:, None].abs(), entries.abs())
    differ = entries[:, None].sign() * entries.sign() < 0
    assert torch.equal(got.samples, (smaller > 0).double().sum(2))
    assert torch.equal(got.conflicts, differ.double().sum(2))
    torch.testing.assert_close(got.mass, smaller.sum(2), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(got.conflict_mass, (smaller * differ).sum(2), rtol=1e-9, atol=1e-12)
    assert bool((got.conflict_mass <= got.mass).all()) and bool((got.conflict_mass >= 0).all())


def test_random_adapters_sit_at_chance():
    stack = random_stack([8] * 6, 400, 300, seed=0)
    got = tables(stack)
    off = ~torch.eye(6, dtype=torch.bool)
    for value, chance in (
        (got.overlap_out, got.chance_out),
        (got.overlap_in, got.chance_in),
        (got.interference, got.chance_interference),
    ):
        assert float((value[off] / chance[off]).mean()) == pytest.approx(1, abs=0.1)


def adapter(name: str, **parts) -> Adapter:
    return make_adapter(name, **parts)


def scaled(name: str, factor: float, **parts) -> Adapter:
    config, tensors = adapter_parts(**parts)
    tensors = {k: t * factor if "lora_B" in k else t for k, t in tensors.items()}
    return build_adapter(name, parse_config(config, name), TensorDict(tensors))


@given(seed=st.integers(0, 1000), factor=st.floats(0.1, 10), r=st.integers(1, 5))
def test_cosine_laws(seed, factor, r):
    comparison = compare(
        [
            adapter("a", seed=seed, r=r),
            scaled("b", factor, seed=seed, r=r),
            scaled("c", -factor, seed=seed, r=r),
            adapter("d", seed=seed + 1, r=3),
        ]
    )
    total = comparison.total
    cosine = total.cosine
    assert cosine[0, 1] == pytest.approx(1) and cosine[0, 2] == pytest.approx(-1)
    torch.testing.assert_close(cosine, cosine.mT)
    assert float(cosine.abs().max()) <= 1
    for matrix in (total.overlap_in, total.overlap_out):
        assert float(matrix.min()) >= 0 and float(matrix.max()) <= 1
        torch.testing.assert_close(matrix, matrix.mT)
        assert matrix[0, 1] == pytest.approx(1, abs=1e-6)
    products = comparison.products
    assert float(torch.linalg.eigvalsh(products).min()) > -1e-9 * float(products.max())
    assert comparison.merged_norm([factor, -1, 0, 0]) < 1e-5 * float(total.norms[1])
    kinds = {(v.first, v.second): v.kind for v in judge(comparison)}
    assert kinds[0, 1] == "same" and kinds[0, 2] == "opposite"


@given(ranks=ranks, seed=st.integers(0, 1000), d_out=st.integers(2, 30), d_in=st.integers(2, 30))
def test_inner_products_are_those_of_core_spaces_cores(ranks, seed, d_out, d_in):
    stack = random_stack(ranks, d_out, d_in, seed=seed)
    left = torch.linalg.qr(stack.up.double()).Q
    right = torch.linalg.qr(stack.down.double().mT).Q
    cores = torch.stack([left.mT @ dense(stack, i) @ right for i in range(len(ranks))]).flatten(1)
    got = tables(stack).products
    torch.testing.assert_close(got, cores @ cores.mT, rtol=1e-9, atol=1e-9)
    weights = torch.randn(
        len(ranks), generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    merged = sum(float(w) * dense(stack, i) for i, w in enumerate(weights))
    square = float(torch.linalg.matrix_norm(merged)) ** 2
    assert float(weights @ got @ weights) == pytest.approx(square, rel=1e-8, abs=1e-8)


def test_absent_modules_count_as_zero_and_nothing_is_nan():
    names = list(SHAPES)
    comparison = compare(
        [
            adapter("a", shapes={n: SHAPES[n] for n in names[:2]}),
            adapter("b", shapes={n: SHAPES[n] for n in names[2:]}),
            scaled("zero", 0.0),
        ],
        per_module=True,
    )
    text = json.dumps(comparison.to_dict(), allow_nan=False)
    assert json.loads(text)["total"]["cosine"][0][1] == 0
    assert float(comparison.total.norms[2]) == 0
    assert [v.kind for v in judge(comparison)] == ["independent", "independent", "apart"]


def test_a_shared_frozen_factor_and_a_shared_start_are_seen():
    config, one = adapter_parts(r=4, seed=1)
    _, two = adapter_parts(r=4, seed=2)
    frozen = {k: one[k] if "lora_A" in k else two[k] for k in one}
    drifted = {k: one[k] + 0.3 * two[k] if "lora_A" in k else two[k] for k in one}
    opened = [
        build_adapter(n, parse_config(config, n), TensorDict(t))
        for n, t in (("one", one), ("frozen", frozen), ("drifted", drifted))
    ]
    shared = {(v.first, v.second): v.shared for v in judge(compare(opened))}
    assert shared[0, 1] == "A" and shared[0, 2] == "init"


def test_conflict_is_found_where_it_is():
    config, one = adapter_parts(r=4, seed=1)
    where = list(SHAPES)[3]
    _, other = adapter_parts(r=4, seed=2)
    two = dict(other)
    for half in "AB":
        key = f"base_model.model.{where}.lora_{half}.weight"
        two[key] = -one[key] if half == "B" else one[key]
    opened = [
        build_adapter(n, parse_config(config, n), TensorDict(t))
        for n, t in (("a", one), ("b", two))
    ]
    verdict = judge(compare(opened))[0]
    assert verdict.kind == "conflict" and verdict.where == (where,)


def test_jobs_do_not_change_a_bit():
    opened = [adapter(str(i), seed=i) for i in range(3)]
    one, many = (compare(opened, jobs=n, per_module=True).to_dict() for n in (1, 3))
    assert json.dumps(one) == json.dumps(many)


def test_bad_input():
    with pytest.raises(MethodError, match="at least two"):
        compare([adapter("a")])
    with pytest.raises(AlignmentError):
        compare([adapter("a"), adapter("b", base_model_name_or_path="other")])
    config, tensors = adapter_parts()
    key = next(iter(tensors))
    tensors[key] = tensors[key] * float("nan")
    bad = build_adapter("bad", parse_config(config, "bad"), TensorDict(tensors))
    with pytest.raises(AdapterError, match="bad: model"):
        compare([adapter("a"), bad])


def planted(count: int = 9, groups: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(groups, 50, generator=generator, dtype=torch.float64)
    points = centres[torch.arange(count) % groups]
    points = points + 0.3 * torch.randn(count, 50, generator=generator, dtype=torch.float64)
    points = points / torch.linalg.vector_norm(points, dim=1, keepdim=True)
    return points @ points.mT


@pytest.mark.parametrize("algorithm", ["agglomerative", "spectral"])
def test_planted_groups_are_found(algorithm):
    cosine = planted()
    assert cluster_adapters(cosine, 3, algorithm=algorithm) == [0, 1, 2] * 3
    assert cluster_adapters(cosine, algorithm=algorithm) == [0, 1, 2] * 3


def test_unrelated_adapters_are_no_group():
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(6, 4000, generator=generator, dtype=torch.float64)
    points = points / torch.linalg.vector_norm(points, dim=1, keepdim=True)
    assert cluster_adapters(points @ points.mT) == list(range(6))
    # Two families and two loners; one family alone.
    points[1] = points[0] + 0.3 * points[1]
    points[3] = points[2] + 0.3 * points[3]
    points = points / torch.linalg.vector_norm(points, dim=1, keepdim=True)
    assert cluster_adapters(points @ points.mT) == [0, 0, 1, 1, 2, 3]
    assert cluster_adapters((points @ points.mT)[:2, :2]) == [0, 0]
    with pytest.raises(MethodError):
        cluster_adapters(points @ points.mT, 7)


def test_tree_joins_the_closest_first():
    cosine = planted()
    tree = tree_of(cosine)
    assert list(tree.heights) == sorted(tree.heights)
    assert sorted(tree.order) == list(range(9))
    off = cosine - 2 * torch.eye(9, dtype=torch.float64)
    assert tree.heights[0] == pytest.approx(1 - float(off.max()))
    assert all(a % 3 == b % 3 for a, b in tree.merges[:3])


def test_angles_are_kept_for_chosen_modules_of_many_adapters():
    many = [adapter(str(i), seed=i, r=2 + i % 3) for i in range(10)]
    chosen = compare(many, modules=["0.*.up_proj"], angles=True, per_module=True)
    assert [m.label for m in chosen.modules] == ["model.layers.0.mlp.up_proj"]
    document = json.loads(json.dumps(chosen.to_dict(), allow_nan=False))
    (module,) = document["modules"]
    stack = RankStack.of([factors(a, module["label"]) for a in many])
    for i in range(10):
        for j in range(10):
            expected = torch.linalg.svdvals(bases(stack, i)[0].mT @ bases(stack, j)[0])
            assert module["angles_out"][i][j] == pytest.approx(expected.tolist(), abs=1e-6)
            mean = sum(c**2 for c in module["angles_in"][i][j]) / len(expected)
            assert module["overlap_in"][i][j] == pytest.approx(mean, abs=1e-6)
    assert "angles_out" not in compare(many, per_module=True).to_dict()["modules"][0]
    with pytest.raises(MethodError, match="no module matches"):
        compare(many, modules=["nothing"])


def test_interference_of_the_whole_set_is_said_for_any_number():
    twins = [adapter(str(i), seed=0) for i in range(9)]
    assert compare(twins).total.set_interference == pytest.approx(1)
    apart = [adapter(str(i), seed=i) for i in range(9)]
    assert compare(apart).total.set_interference < 0.5


def factors(one: Adapter, name: str) -> tuple[torch.Tensor, torch.Tensor, float]:
    a, b = one.read(name)
    return a.double(), b.double(), one.modules[name].scaling


def test_modules_are_kept_only_where_asked_for_and_add_up_to_the_whole():
    many = [adapter(str(i), seed=i, r=2 + i % 3) for i in range(4)]
    seen: list[PairMatrices] = []
    summed = compare(many, on_matrices=seen.append)
    kept = compare(many, per_module=True)
    assert summed.modules == () and not summed.whole_modules
    assert [m.label for m in kept.modules] == [m.label for m in seen] == sorted(SHAPES)
    assert summed.to_dict() == {k: v for k, v in kept.to_dict().items() if k != "modules"}
    products = sum(m.cosine * m.norms[:, None] * m.norms for m in kept.modules)
    torch.testing.assert_close(summed.products, products)
    assert judge(summed) == judge(kept)


def test_the_telling_modules_are_those_of_the_strongest_conflict(monkeypatch):
    one = adapter("one", seed=1)
    many = [one, *(scaled(str(i), -1.0, seed=1) for i in range(2))]
    kept = compare(many, per_module=True)
    scores = sorted((float(m.cosine[0, 1]), m.label) for m in kept.modules)
    assert kept.telling.where("conflict", 0, 1) == tuple(label for _, label in scores[:3])
    assert kept.telling.where("conflict", 1, 2) == ()


@pytest.mark.parametrize("per_module", [False, True])
def test_a_plan_foretells_units_bytes_and_memory(per_module):
    many = [adapter(str(i), seed=i, r=2 + i % 3) for i in range(5)]
    plan = plan_comparison(many, per_module=per_module)
    assert (plan.adapters, plan.modules, plan.units) == (5, len(SHAPES), 2 + 3 + 4 + 2 + 3)
    assert plan.reads == sum(a.num_parameters for a in many) * 4
    kept = (2 * len(SHAPES) if per_module else 0) + 2
    assert plan.result_bytes >= kept * 8 * 25 * 19
    alone = plan_comparison(many, per_module=per_module, jobs=1)
    assert plan_comparison(many, per_module=per_module, jobs=2).peak_bytes - alone.peak_bytes == (
        plan.working_bytes
    )
