"""Data-driven merges against plain code, and the statistics they need against direct sums."""

from pathlib import Path

import pytest
import torch
from dense import esm
from merging import merge_one, task_inputs
from torch import nn

import lora_merge
from builders import SHAPES, make_adapter, random_stack
from lora_merge.adapters.alignment import align, read_stacks
from lora_merge.adapters.measured.activations import Statistics, collect_statistics
from lora_merge.errors import LoraMergeError, MethodError
from lora_merge.merge.methods.method import Job
from lora_merge.merge.methods.with_statistics.essential import EsmOptions
from lora_merge.merge.methods.with_statistics.essential import esm as esm_of_one


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.self_attn = nn.ModuleDict({"q_proj": nn.Linear(16, 24)})
        self.mlp = nn.ModuleDict({"up_proj": nn.Linear(16, 40), "back": nn.Linear(64, 16)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        both = torch.cat([self.self_attn["q_proj"](x), self.mlp["up_proj"](x)], dim=-1)
        return torch.tanh(self.mlp["back"](both))


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = nn.ModuleDict({"layers": nn.ModuleList([Block(), Block()])})

    def forward(self, x: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        for layer in self.model["layers"]:
            x = layer(x)
        return x


@pytest.mark.parametrize("off_diagonal", [0.0, 0.9, 1.0])
def test_regmean_is_the_least_squares_solution(off_diagonal) -> None:
    stack = random_stack((4, 6, 5), 30, 20)
    grams = []
    for x in task_inputs(stack).values():
        gram = x @ x.mT / x.shape[1]
        grams.append(off_diagonal * gram + (1 - off_diagonal) * torch.diag(gram.diagonal()))
    deltas = [stack.of_adapter(i).delta() for i in range(3)]
    wanted = sum(d @ g for d, g in zip(deltas, grams, strict=True)) @ torch.linalg.inv(sum(grams))
    parameters = {"off_diagonal": off_diagonal, "ridge": 1e-12}
    torch.testing.assert_close(merge_one(stack, "regmean", parameters=parameters), wanted)


@pytest.mark.parametrize("method", ["regmean", "regmean-iso"])
def test_a_cut_loses_least_of_what_regmean_minimises(method) -> None:
    """No X of the rank has a smaller error on the inputs; found by dense steps in their metric."""
    stack = random_stack((4, 6, 5), 30, 20)
    inputs = task_inputs(stack)
    parameters = {"off_diagonal": 1.0, "ridge": 0.3, "beta": 0.0, "restore": False}
    grams = [x @ x.mT / x.shape[1] for x in inputs.values()]
    pull = 0.3 * sum(grams).diagonal().mean() * torch.eye(20).double()
    deltas = [stack.of_adapter(i).delta() for i in range(3)]
    wanted = sum(d @ (g + pull) for d, g in zip(deltas, grams, strict=True))
    values, vectors = torch.linalg.eigh(sum(grams) + pull)
    root = vectors @ values.sqrt().diag() @ vectors.mT
    x = torch.linalg.solve(root, wanted.mT).mT
    u, s, vh = torch.linalg.svd(x)
    cut = torch.linalg.solve(root, ((u[:, :6] * s[:6]) @ vh[:6]).mT).mT
    found = merge_one(stack, method, rank=6, parameters=parameters)
    torch.testing.assert_close(found, cut)
    flat = merge_one(stack, method, rank=6, parameters={**parameters, "beta": 0.25})
    assert float(flat.norm()) == pytest.approx(float(found.norm()))
    whole = merge_one(stack, method, rank=6, parameters={**parameters, "restore": True})
    moved = [float((d @ x).square().mean()) for d, x in zip(deltas, inputs.values(), strict=True)]
    done = [float((whole @ x).square().mean()) for x in inputs.values()]
    assert sum(done) == pytest.approx(sum(moved))
    torch.testing.assert_close(whole / whole.norm(), found / found.norm())
    before, after = torch.linalg.svdvals(found)[:6], torch.linalg.svdvals(flat)[:6]
    torch.testing.assert_close(after / after[0], (before / before[0]) ** 0.75)


def test_ssr_is_the_best_router_from_all_units() -> None:
    """Among all X = B_c R A_c it predicts each adapter's own z best on that adapter's inputs."""
    stack = random_stack((3, 4), 30, 20)
    left, right = [], []
    for owner, x in task_inputs(stack).items():
        z = stack.down @ x
        left.append(z)
        right.append(torch.where((stack.owner == owner)[:, None], z, 0.0))
    z, own = torch.cat(left, dim=1), torch.cat(right, dim=1)
    router = torch.linalg.lstsq(z.mT, own.mT).solution.mT
    wanted = (stack.up * stack.scale) @ router @ stack.down
    torch.testing.assert_close(merge_one(stack, "ssr", parameters={"ridge": 1e-12}), wanted)


@pytest.mark.parametrize("shape", [(14, 11), (30, 40)], ids=["R-above-d", "R-below-d"])
@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.7, 1.3, -0.4)])
@pytest.mark.parametrize("each", [None, 2])
def test_esm_agrees_with_dense_code_on_the_inputs_themselves(shape, weights, each) -> None:
    stack = random_stack((4, 6, 5), *shape)
    deltas = [stack.of_adapter(i).delta() for i in range(3)]
    wanted = esm(deltas, weights, [task_inputs(stack)[i] for i in range(3)], each)
    found = merge_one(stack, "esm", weights=weights, rank=each and 3 * each)
    torch.testing.assert_close(found, wanted, rtol=1e-7, atol=1e-7)


def test_esm_scales_modules_by_their_norm_among_their_kind(tmp_path: Path) -> None:
    torch.manual_seed(0)
    adapters = [make_adapter(f"adapter-{i}", r=3, seed=i) for i in range(2)]
    path = tmp_path / "s.st"
    collect_statistics(Tiny(), adapters, [[torch.randn(40, 16)]] * 2, path)
    options = {"rank": "full", "scale": 1.0, "statistics": str(path), "parameters": {"power": 1.0}}
    found = align([lora_merge.merge(adapters, method="esm", **options)])
    alignment = align(adapters)
    stacks = {m.name: next(read_stacks(alignment, m)) for m in alignment.modules}
    statistics = Statistics.open(path)
    names = tuple(a.name for a in alignment.adapters)
    alone = {}
    for name, stack in stacks.items():
        job = Job(name, None, torch.ones(2).double(), 0, statistics=statistics.of(name, names))
        alone[name] = esm_of_one(stack, job, EsmOptions(power=1.0)).stack.norm()
    kinds: dict[str, list[str]] = {}
    for name in stacks:
        kinds.setdefault(name.split(".", 3)[3], []).append(name)
    assert any(len(same) > 1 for same in kinds.values())
    norms = {m.name: next(read_stacks(found, m)).norm() for m in found.modules}
    for same in kinds.values():
        mean = sum(alone[name] for name in same) / len(same)
        for name in same:
            assert norms[name] == pytest.approx(alone[name] ** 2 / mean, rel=1e-4)


def test_collected_statistics_are_sums_over_what_modules_see(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Tiny()
    adapters = [make_adapter(f"adapter-{i}", r=r, seed=i) for i, r in enumerate((4, 2))]
    batches = [[torch.randn(5, 7, 16) for _ in range(2)], [(torch.randn(3, 16),)]]
    statistics = collect_statistics(model, adapters, batches, tmp_path / "s.st", inputs=True)
    assert statistics.adapters == ("adapter-0", "adapter-1")
    alignment = align(adapters)
    stacks = {m.name: next(read_stacks(alignment, m)) for m in alignment.modules}
    last = "model.layers.1.mlp.up_proj"
    for index, own in enumerate(batches):
        # The same forward pass with the adapter merged into the weights.
        merged = Tiny()
        merged.load_state_dict(model.state_dict())
        for name in SHAPES:
            part = stacks[name].of_adapter(index)
            merged.get_submodule(name).weight.data += part.delta()
        x = torch.cat([b[0] if isinstance(b, tuple) else b.flatten(0, 1) for b in own])
        seen = merged.model["layers"][0](x).double()
        found = statistics.of(last, statistics.adapters)
        z = seen @ stacks[last].down.double().mT
        torch.testing.assert_close(
            found[f"x.{index}"], seen.mT @ seen / len(x), rtol=1e-4, atol=1e-6
        )
        torch.testing.assert_close(found[f"z.{index}"], z.mT @ z / len(x), rtol=1e-4, atol=1e-6)


def test_padding_is_not_seen(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, adapters = Tiny(), [make_adapter("one", r=3, seed=1)]
    x = torch.randn(2, 5, 16)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    padded = collect_statistics(
        model, adapters, [[{"x": x, "attention_mask": mask}]], tmp_path / "a.st"
    )
    bare = collect_statistics(model, adapters, [[x[mask.bool()]]], tmp_path / "b.st")
    for name in SHAPES:
        found, wanted = (s.of(name, ("one",))["z.0"] for s in (padded, bare))
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("method", ["regmean", "regmean-iso", "ssr", "esm"])
def test_merging_with_a_file(method, tmp_path: Path) -> None:
    torch.manual_seed(0)
    adapters = [make_adapter(f"adapter-{i}", r=r, seed=i) for i, r in enumerate((4, 2, 3))]
    batches = {a.name: [torch.randn(40, 16) * (i + 1)] for i, a in enumerate(adapters)}
    path = tmp_path / "s.st"
    collect_statistics(Tiny(), adapters, batches, path, inputs=True)
    merged = lora_merge.merge(adapters, method=method, rank=9, statistics=str(path))
    assert set(merged.modules) == set(SHAPES)
    # A subset, in another order: the file's numbers follow the names.
    pair = lora_merge.merge([adapters[2], adapters[0]], method=method, statistics=str(path))
    absent = lora_merge.merge(
        adapters, method=method, weights=[1.0, 0.0, 1.0], statistics=str(path)
    )
    for name in SHAPES:
        assert all(
            torch.equal(a, b) for a, b in zip(pair.read(name), absent.read(name), strict=True)
        )
    alone = lora_merge.merge([adapters[1]], method=method, statistics=str(path))
    one = next(read_stacks(align([alone]), align([alone]).modules[0])).delta()
    own = next(read_stacks(align([adapters[1]]), align([adapters[1]]).modules[0])).delta()
    torch.testing.assert_close(one, own, rtol=1e-4, atol=1e-6)


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    adapters = [make_adapter(f"adapter-{i}", seed=i) for i in range(2)]
    with pytest.raises(LoraMergeError, match="needs statistics"):
        lora_merge.merge(adapters, method="ssr")
    (tmp_path / "no.st").write_bytes(b"nothing")
    with pytest.raises(LoraMergeError, match="no statistics file"):
        Statistics.open(tmp_path / "no.st")
    with pytest.raises(MethodError, match="smooth changes them"):
        lora_merge.merge(adapters, method="ssr", smooth="flat")
    with pytest.raises(LoraMergeError, match="no batches"):
        collect_statistics(Tiny(), adapters, [[torch.randn(2, 16)], []], tmp_path / "s.st")
    with pytest.raises(LoraMergeError, match="no module"):
        collect_statistics(nn.Linear(2, 2), adapters, [[], []], tmp_path / "s.st")
    path = tmp_path / "s.st"
    collect_statistics(Tiny(), adapters, [[torch.randn(2, 16)]] * 2, path)
    with pytest.raises(MethodError, match=r"model.layers.0.mlp.up_proj") as caught:
        lora_merge.merge(adapters, method="regmean", statistics=str(path))
    assert "inputs=True" in caught.value.remedy
    other = make_adapter("other", seed=5)
    with pytest.raises(LoraMergeError, match="statistics of other"):
        lora_merge.merge([adapters[0], other], method="ssr", statistics=str(path))
