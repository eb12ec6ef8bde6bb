"""A linear gate in place of X-LoRA's second pass."""

import pytest
import torch
from tiny import experts_for, llama, shapes_of, tokens

from lora_merge.errors import MethodError
from lora_merge.mixture.mixture import Mixture
from lora_merge.mixture.runtime.attach import load_mixture
from lora_merge.mixture.runtime.call.passes import current
from lora_merge.mixture.training.data import Example
from lora_merge.mixture.training.distill import distill_xlora


def rows(count: int, seed: int) -> list[Example]:
    return [Example(tuple(row.tolist()), 0, -1) for row in tokens(count, 12, seed=seed)]


def test_the_rows_are_the_ridge_solution() -> None:
    """Against least squares on inputs and scores recorded by hand."""
    from builders import make_adapter

    model = llama()
    shapes = shapes_of(model)
    experts = [make_adapter(f"e{i}", r=3, seed=i, shapes=shapes) for i in range(3)]
    mixture = Mixture(experts, "xlora")
    examples = rows(6, 1)
    result = distill_xlora(model, mixture, examples, ridge=0.01, batch_size=2)
    assert not hasattr(model, "mixture") and result.mixture.spec.signal == "input"
    ids = torch.tensor([e.ids for e in examples])
    handle = load_mixture(model, mixture)
    inputs: dict[str, torch.Tensor] = {}
    scores: list[torch.Tensor] = []

    def keep(name: str) -> object:
        def hook(module: object, args: tuple[torch.Tensor]) -> None:
            if not current(handle.switch).bypass:
                inputs[name] = args[0].flatten(0, 1)

        return hook

    name = "model.layers.1.mlp.down_proj"
    model.get_submodule(name).register_forward_pre_hook(keep(name))
    look = handle.using(observe_hidden=lambda s, w, p: scores.append(s))
    with torch.no_grad(), look:
        model(ids, use_cache=False)
    x = inputs[name].double()
    y = scores[mixture.modules.index(name)].double()
    y = y - y.mean(1, keepdim=True)
    extra = (0.01 * (x * x).sum() / x.shape[1]).sqrt() * torch.eye(x.shape[1])
    solution = torch.linalg.lstsq(
        torch.cat([x, extra]), torch.cat([y, torch.zeros(x.shape[1], 3, dtype=y.dtype)])
    ).solution
    torch.testing.assert_close(
        result.mixture.gate[f"{name}.weight"].double(), solution.T, rtol=1e-3, atol=1e-4
    )


def test_the_error_is_measured_on_the_rows_given() -> None:
    model = llama()
    mixture = Mixture(experts_for(model)[:2], "xlora", granularity="model")
    for name in mixture.gate:
        mixture.gate[name] = mixture.gate[name] * 8
    learned = distill_xlora(model, mixture, rows(60, 1))
    held = distill_xlora(model, mixture, rows(60, 1), held=rows(20, 2))
    assert 0 < learned.error < held.error < 0.5
    uniform = Mixture.of(
        learned.mixture.spec,
        mixture.experts,
        {k: torch.zeros_like(v) for k, v in learned.mixture.gate.items()},
    )
    handle = load_mixture(model, mixture)
    ids = torch.tensor([e.ids for e in rows(20, 2)])
    with torch.no_grad():
        exact = model(ids).logits
        handle.detach()
        errors = []
        for one in (held.mixture, uniform):
            handle = load_mixture(model, one)
            errors.append(float((model(ids).logits - exact).norm()))
            handle.detach()
    assert errors[0] < 0.9 * errors[1]  # nearer to X-LoRA than no gate at all


def test_a_gate_with_memory_keeps_it_and_is_fitted_to_what_each_token_says() -> None:
    """Else the student would remember sums of what the teacher remembered already."""
    model = llama()
    fitted = []
    for memory in (0.0, 0.9):
        mixture = Mixture(experts_for(model), "recall", memory=memory, seed=3)
        student = distill_xlora(model, mixture, rows(12, 1), batch_size=4).mixture
        assert student.spec.memory == memory
        fitted.append(student.gate["model.layers.0.self_attn.q_proj.weight"])  # reads no expert
    torch.testing.assert_close(fitted[0], fitted[1], rtol=1e-3, atol=1e-5)


def test_only_two_pass_gates_are_distilled() -> None:
    model = llama()
    with pytest.raises(MethodError, match="no second pass"):
        distill_xlora(model, Mixture(experts_for(model), "arrow"), rows(2, 0))
