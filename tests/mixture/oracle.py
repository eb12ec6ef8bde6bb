"""A mixture as the papers write it: a loop over experts in float64, one gate at a time."""

from math import exp

import torch
from torch import Tensor

from lora_merge.adapters.adapter import Adapter
from lora_merge.mixture.mixture import Mixture


def expert_delta(adapter: Adapter, module: str, x: Tensor) -> Tensor:
    a, b = adapter.read(module)
    return adapter.modules[module].scaling * (x @ a.double().T @ b.double().T)


def top_direction(adapter: Adapter, module: str) -> Tensor:
    a, b = adapter.read(module)
    return torch.linalg.svd(b.double() @ a.double()).Vh[0]


def softmax_of_kept(scores: Tensor, top_k: int, temperature: float = 1.0) -> Tensor:
    """Token by token, expert by expert."""
    table = []
    for row in scores.tolist():
        kept = sorted(range(len(row)), key=lambda e: -row[e])[:top_k]
        total = sum(exp(row[e] / temperature) for e in kept)
        table.append(
            [exp(v / temperature) / total if e in kept else 0.0 for e, v in enumerate(row)]
        )
    return torch.tensor(table, dtype=torch.float64)


def scores_of(mixture: Mixture, module: str, present: list[int], x: Tensor) -> Tensor:
    """Scores (T, E) of one module for tokens x (T, d_in)."""
    adapters = [e.adapter for e in mixture.experts]
    preset, gate = mixture.spec.preset, mixture.gate
    if preset in ("arrow", "sequence"):
        return torch.stack([(x @ top_direction(adapters[e], module)).abs() for e in present], 1)
    if preset == "spectr":
        return torch.stack([expert_delta(adapters[e], module, x).norm(dim=1) for e in present], 1)
    rows = gate[f"{module}.weight"].double()
    if preset == "phatgoose":
        width = x.shape[1:]
        x, rows = (torch.nn.functional.layer_norm(t, width) for t in (x, rows))
        return x @ rows.T / width[0] ** 0.5
    return x @ rows.T


def install(model: torch.nn.Module, mixture: Mixture) -> None:
    """Hook the loop into a float64 model; local gates with one weight per expert."""
    spec = mixture.spec
    for module in mixture.alignment.modules:
        present = list(module.specs)

        def hook(
            target: object,
            args: tuple[Tensor],
            y: Tensor,
            name: str = module.name,
            present: list[int] = present,
        ) -> Tensor:
            x = args[0].reshape(-1, args[0].shape[-1])
            flat = y.reshape(-1, y.shape[-1]).clone()
            if spec.signal == "constant":
                weights = torch.tensor([[spec.weights[e] for e in present]] * len(x))
            else:
                scores = scores_of(mixture, name, present, x)
                if spec.sequence:
                    rows = args[0].shape[0]
                    means = scores.view(rows, -1, len(present)).mean(1)
                    scores = means.repeat_interleave(len(x) // rows, 0)
                top_k = spec.top_k or len(present)
                weights = softmax_of_kept(scores, top_k, spec.temperature)
            for place, e in enumerate(present):
                delta = expert_delta(mixture.experts[e].adapter, name, x)
                flat += weights[:, place : place + 1].double() * delta
            return flat.view(y.shape)

        model.get_submodule(module.name).register_forward_hook(hook)
