"""Fit a two-pass gate to labels alone, before the language model's loss refines it.

The classifier's inputs are the base model's hidden states, which no gate changes. So they are
recorded once, without a second pass and without gradients through the model, and the classifier is
fitted to the rows' experts by L-BFGS, whose steps cost next to nothing.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from lora_merge.mixture.gates.memory import accumulate
from lora_merge.mixture.runtime.attach import AttachedMixture
from lora_merge.mixture.runtime.call.hooks import body_of
from lora_merge.mixture.runtime.two_pass import HiddenGate, hidden_states
from lora_merge.mixture.training.data import Example, in_order

_MOST = 2**26  # recorded numbers: a quarter of a gigabyte
_DECAY = 1e-4


def fit_to_labels(
    model: nn.Module,
    attached: AttachedMixture,
    examples: Sequence[Example],
    *,
    seed: int,
    iterations: int = 60,
    batch_size: int = 16,
) -> None:
    """Set the classifier to tell the labelled tokens' experts; all modules get the same answer.

    Args:
        model: With the mixture attached.
        attached: An X-LoRA-like mixture.
        examples: Rows, some of them labelled; drawn in a seeded order until enough are recorded.
        seed: Of that order.
        iterations: Of L-BFGS.
        batch_size: Rows of one pass.
    """
    gate, labelled = attached.classifier, [e for e in examples if e.is_labelled]
    if gate is None or not labelled:
        return
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labelled), generator=generator).tolist()
    hidden, owners = _record(model, attached, labelled, order, batch_size)
    _fit(gate, attached.mixture.spec.memory, hidden, owners, iterations)


def _record(
    model: nn.Module,
    attached: AttachedMixture,
    rows: Sequence[Example],
    order: Sequence[int],
    batch_size: int,
) -> tuple[list[Tensor], list[Tensor]]:
    """First-pass hidden states (B, S, width) and owners (B, S) of batches; -1 is no label."""
    body, was_training = body_of(model), model.training
    model.eval()
    hidden, owners, size = [], [], 0
    for batch in in_order([rows[i] for i in order], batch_size):
        on = batch.to(attached.device)
        with torch.no_grad(), attached.first_pass():
            states = hidden_states(body, input_ids=on.ids, attention_mask=on.mask, use_cache=False)
        hidden.append(states.float())
        owners.append(on.owners.masked_fill(on.mask == 0, -1))
        size += states.numel()
        if size >= _MOST:
            break
    model.train(was_training)
    return hidden, owners


def _fit(
    gate: HiddenGate,
    memory: float,
    hidden: Sequence[Tensor],
    owners: Sequence[Tensor],
    iterations: int,
) -> None:
    known = torch.cat([h[o >= 0] for h, o in zip(hidden, owners, strict=True)])
    mean, deviation = known.mean(0), known.std(0).clamp_min(1e-3)
    hidden = [(h - mean) / deviation for h in hidden]
    layers = _one_answer(gate)
    wanted = torch.cat([o.flatten() for o in owners]).masked_fill_(
        torch.cat([o.flatten() for o in owners]) < 0, -100
    )
    parameters = [p for layer in layers for p in layer.parameters()]
    optimizer = torch.optim.LBFGS(
        parameters, max_iter=iterations, line_search_fn="strong_wolfe", tolerance_change=1e-6
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        scores = [_scores(layers, h) for h in hidden]
        if memory:
            scores = [accumulate(s, memory) for s in scores]
        loss = functional.cross_entropy(torch.cat([s.flatten(0, 1) for s in scores]), wanted)
        total: Tensor = loss + _DECAY * torch.stack([p.square().sum() for p in parameters]).sum()
        total.backward()
        return total

    with torch.enable_grad():
        optimizer.step(closure)
    _store(gate, layers, mean, deviation)


def _one_answer(gate: HiddenGate) -> list[nn.Linear]:
    """A float32 copy of the classifier for standardised inputs, with one module's outputs."""
    layers = []
    for index, old in enumerate(gate.linears):
        last = index == len(gate.linears) - 1
        outputs = old.out_features // (gate.num_scores if last else 1)
        new = nn.Linear(old.in_features, outputs, device=old.weight.device)
        with torch.no_grad():
            new.weight.copy_(old.weight[:outputs])
            new.bias.copy_(old.bias[:outputs])
        layers.append(new)
    return layers


def _scores(layers: Sequence[nn.Linear], state: Tensor) -> Tensor:
    for index, layer in enumerate(layers):
        state = layer(torch.relu(state) if index else state)
    return state


@torch.no_grad()
def _store(gate: HiddenGate, layers: Sequence[nn.Linear], mean: Tensor, deviation: Tensor) -> None:
    """Write the layers back: the standardisation becomes part of the first."""
    first = layers[0]
    first.weight.div_(deviation)
    first.bias.sub_(first.weight @ mean)
    for index, (old, new) in enumerate(zip(gate.linears, layers, strict=True)):
        times = gate.num_scores if index == len(layers) - 1 else 1
        old.weight.copy_(new.weight.repeat(times, 1))
        old.bias.copy_(new.bias.repeat(times))
