"""Fitting a classifier to labels: against scikit-learn, and what it does to a run."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from tiny import experts_for, llama, tokens

from lora_merge.mixture.mixture import Mixture
from lora_merge.mixture.runtime.attach import load_mixture
from lora_merge.mixture.training.data import Example
from lora_merge.mixture.training.fit_classifier import fit_to_labels
from lora_merge.mixture.training.settings import TrainSettings
from lora_merge.mixture.training.train import train_gate


def rows(count: int = 30) -> list[Example]:
    """Texts from overlapping ranges of tokens; some change their kind, some have no label."""
    random = torch.Generator().manual_seed(0)
    made = []
    for i in range(count):
        kinds = [i % 3, (i + 1) % 3] if i % 5 == 0 else [i % 3, i % 3]
        ids, owners = [], []
        for kind in kinds:
            ids += torch.randint(2 + 14 * kind, 24 + 14 * kind, (6,), generator=random).tolist()
            owners += [kind] * 6
        made.append(Example(tuple(ids), 0, -1, tuple(owners)))
    return [*made, Example(tuple(tokens(1, 9)[0].tolist()), 0, -1)]


def test_one_layer_without_memory_is_logistic_regression() -> None:
    model = llama()
    handle = load_mixture(model, Mixture(experts_for(model), "xlora"))
    fit_to_labels(model, handle, rows(), seed=0, iterations=300)
    weights, features, owners = [], [], []
    for row in rows():
        ids = torch.tensor([row.ids])
        with torch.no_grad(), handle.watch() as usage:
            model(ids, use_cache=False)
        if row.owners:
            seen = [entry.last for entry in usage.modules.values() if entry.last.shape[1] == 3]
            assert all(torch.equal(one, seen[0]) for one in seen)
            weights.append(seen[0])
            owners += row.owners
            with torch.no_grad(), handle.disabled():
                features.append(model.model(ids, use_cache=False).last_hidden_state[0])
    x = torch.cat(features).double().numpy()
    x = (x - x.mean(0)) / x.std(0, ddof=1)
    # Ours: mean cross-entropy + 1e-4 |w|^2; theirs: sum of cross-entropy + |w|^2 / (2 C).
    theirs = LogisticRegression(C=1 / (2e-4 * len(x)), max_iter=5000, tol=1e-8).fit(x, owners)
    np.testing.assert_allclose(torch.cat(weights).numpy(), theirs.predict_proba(x), atol=0.02)


@pytest.mark.parametrize("preset", ["recall", "xlora"])
def test_a_run_begins_where_the_labels_lead(preset: str) -> None:
    model = llama()
    mixture = Mixture(experts_for(model, (4, 4, 4)), preset)
    losses = {}
    for task in (0.0, None):
        history = []
        settings = TrainSettings(steps=2, batch_size=8, task_loss=task, z_loss=1e-9)
        train_gate(model, mixture, rows(), settings, on_step=history.append)
        losses[task] = history[0]["task"]
    assert losses[None] < 0.6 * losses[0.0]


def test_without_labels_nothing_is_fitted() -> None:
    model = llama()
    mixture = Mixture(experts_for(model), "recall")
    handle = load_mixture(model, mixture)
    before = {n: t.clone() for n, t in handle.gate_tensors().items()}
    fit_to_labels(model, handle, rows()[-1:], seed=0)
    assert all(torch.equal(t, before[n]) for n, t in handle.gate_tensors().items())
