"""SoRA: the proximal operator, and that pruned is zeroed."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import experts_for, llama, tokens

from lora_merge.errors import MethodError
from lora_merge.mixture.formats.experts_in_memory import rebuilt_experts
from lora_merge.mixture.mixture import Mixture
from lora_merge.mixture.runtime.attach import load_mixture
from lora_merge.mixture.training.data import Example
from lora_merge.mixture.training.settings import TrainSettings
from lora_merge.mixture.training.sora import add_rank_gates, proximal_step, soft_threshold
from lora_merge.mixture.training.train import train_gate

numbers = st.floats(-3, 3)


def rows(count: int = 12) -> list[Example]:
    return [Example(tuple(r.tolist()), 0, i % 3) for i, r in enumerate(tokens(count, 10, seed=4))]


@given(numbers, st.floats(0, 2))
def test_the_soft_threshold_minimises(value: float, threshold: float) -> None:
    """Against the objective itself on a fine grid, and Moreau's identity."""
    grid = torch.linspace(-4, 4, 16001, dtype=torch.float64)
    objective = (grid - value) ** 2 / 2 + threshold * grid.abs()
    got = soft_threshold(torch.tensor([value], dtype=torch.float64), threshold)
    assert float(got) == pytest.approx(float(grid[objective.argmin()]), abs=6e-4)
    clamped = min(max(value, -threshold), threshold)  # prox of the dual norm's ball
    assert float(got) + clamped == pytest.approx(value, abs=1e-12)


def test_proximal_descent_solves_the_lasso() -> None:
    """min |D r - c|^2 / 2 + penalty |r|_1 with orthogonal D has a closed form."""
    torch.manual_seed(0)
    design = torch.linalg.qr(torch.randn(20, 8, dtype=torch.float64)).Q
    target = torch.randn(20, dtype=torch.float64)
    values = torch.ones(8, dtype=torch.float64, requires_grad=True)
    for _ in range(300):
        ((design @ values - target) ** 2).sum().div(2).backward()
        proximal_step([values], rate=0.3, penalty=0.4)
    expected = soft_threshold(design.mT @ target, 0.4)
    assert 0 < int((expected == 0).sum()) < 8
    torch.testing.assert_close(values.detach(), expected)
    assert ((values == 0) == (expected == 0)).all()


@pytest.mark.parametrize("preset", ["meteora", "xlora", "arrow", "constant"])
@given(seed=st.integers(0, 10_000))
def test_pruned_is_zeroed(preset: str, seed: int) -> None:
    """Any rank gates, also with whole experts of a module at zero."""
    model = llama()
    mixture = Mixture(experts_for(model), preset)
    handle = load_mixture(model, mixture)
    random = torch.Generator().manual_seed(seed)
    factors = {}
    for group, gates in zip(handle.parts, add_rank_gates(handle.parts), strict=True):
        drawn = torch.randn(len(gates), generator=random)
        kept = torch.rand(len(gates), generator=random) < torch.rand(1, generator=random)
        gates.data.copy_(drawn * kept)
        for m, name in enumerate(group.names):
            part = slice(group.units[m], group.units[m + 1])
            up = getattr(group, f"up{m}").data * gates.data[part, None]
            factors[name] = (group.down.data[part], up)
    with torch.no_grad():
        zeroed = model(tokens()).logits
    handle.detach()
    small = Mixture.of(mixture.spec, rebuilt_experts(mixture, factors), mixture.gate)
    for module in small.alignment.modules:
        before = next(m for m in mixture.alignment.modules if m.name == module.name)
        down, up = factors[module.name]
        alive = int((up != 0).any(1).sum())
        assert alive <= module.num_units <= max(alive, 1) + len(before.specs)
        assert list(module.specs) == list(before.specs) and module.num_units <= len(down)
    load_mixture(model, small)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens()).logits, zeroed, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("preset", ["meteora", "arrow"])
def test_training_prunes_what_does_not_matter(preset: str, tmp_path: Path) -> None:
    """Half of each expert's ranks have no effect: these go and the outputs stay."""
    from tiny import shapes_of

    from builders import make_adapter

    model = llama()
    adapters = []
    for seed in range(3):
        adapter = make_adapter(f"e{seed}", r=4, alpha=40, seed=seed, shapes=shapes_of(model))
        for name in adapter.modules:
            adapter.read(name)[1][:, 2:] *= 1e-4
        adapters.append(adapter)
    mixture = Mixture(adapters, preset)
    history = []
    settings = TrainSettings(
        steps=30, batch_size=12, lr=0.0, weight_decay=0.0, rank_l1=1e-4, rank_lr=700.0, warmup=0
    )
    pruned = train_gate(model, mixture, rows(), settings, on_step=history.append)
    units = [sum(m.num_units for m in x.alignment.modules) for x in (mixture, pruned)]
    assert history[-1]["ranks"] <= units[1] < units[0] * 0.6
    pruned.save_pretrained(tmp_path / "small")
    again = Mixture.from_pretrained(tmp_path / "small")
    assert all(max(e.adapter.ranks()) <= 4 for e in again.experts)
    outputs = []
    for one in (pruned, again):
        handle = load_mixture(model, one)
        outputs.append(model(tokens()).logits)
        handle.detach()
    assert torch.equal(*outputs)


@pytest.mark.parametrize("preset", ["smora", "spectr"])
def test_gates_made_of_ranks_are_not_pruned(preset: str) -> None:
    model = llama()
    with pytest.raises(MethodError, match="computed from the ranks themselves"):
        train_gate(model, Mixture(experts_for(model), preset), rows(), TrainSettings(rank_l1=0.1))
    assert not hasattr(model, "mixture")


@pytest.mark.parametrize("bad", [{"rank_l1": -1.0}, {"rank_l1": 0.1, "rank_lr": 0.0}])
def test_settings_that_mean_nothing_are_refused(bad: dict) -> None:
    with pytest.raises(MethodError, match=r"rank_l[1r] is"):
        TrainSettings(**bad)
