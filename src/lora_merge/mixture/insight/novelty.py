"""Whether texts need an expert that is not there yet (after SEMA, arXiv 2403.18886).

A descriptor knows what the inputs of one module look like on one expert's own texts: a linear
autoencoder, whose optimum is known in closed form (PCA). Text it reconstructs as well as that
expert's own is of its kind. If somewhere in the model no descriptor knows a text, a new expert is
needed. Everything is measured in the base model with the mixture off, so neither gate nor experts
matter, and describing a new expert leaves the others' descriptors as they are.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lora_merge.adapters.module_names import layer_of, natural
from lora_merge.errors import MethodError
from lora_merge.mixture.insight.descriptors import Descriptors
from lora_merge.mixture.mixture import Mixture
from lora_merge.mixture.runtime.targets import find_targets
from lora_merge.mixture.training.data import Batch, Example, in_order
from lora_merge.printing import Report, Summary

# Texts that are nearly alike have nearly no spread, and any other would be strange: a deviation is
# at least this share of the variance of the inputs.
_LEAST_SPREAD = 0.01


@dataclass(frozen=True, repr=False)
class Novelty(Report):
    """How well texts are known.

    Attributes:
        modules: Where it was measured.
        experts: The described experts.
        scores: By module and expert: how many deviations the texts' mean reconstruction error lies
            above that of the expert's own texts.
        threshold: Above which a descriptor does not know a text.
        texts: The same of every text, by text, module and expert: they may be of several kinds.
    """

    modules: tuple[str, ...]
    experts: tuple[str, ...]
    scores: tuple[tuple[float, ...], ...]
    threshold: float
    texts: tuple[tuple[tuple[float, ...], ...], ...]

    @property
    def new_rows(self) -> tuple[int, ...]:
        """Rows, from 0 on, that at some module no descriptor knows; one tells less than many."""
        strange = enumerate(max(map(min, row)) > self.threshold for row in self.texts)
        return tuple(number for number, is_new in strange if is_new)

    def nearest(self, row: int) -> str:
        """The expert that knows a row best: whose largest score is the smallest."""
        worst = [max(scores) for scores in zip(*self.texts[row], strict=True)]
        return self.experts[worst.index(min(worst))]

    @property
    def strangest(self) -> str:
        """The module where the rows' best descriptors know least."""
        totals = [sum(min(row[m]) for row in self.texts) for m in range(len(self.modules))]
        return self.modules[totals.index(max(totals))]

    @property
    def is_new(self) -> bool:
        """Whether no descriptor knows most of the rows: a new expert is needed."""
        return 2 * len(self.new_rows) > len(self.texts)

    def summary(self) -> Summary:
        """Whether the texts are known, and where they are strangest."""
        known = "a new expert is needed" if self.is_new else "these texts are known"
        scores = dict(zip(self.modules, self.scores, strict=True))[self.strangest]
        shown = ", ".join(f"{n} {s:.1f}" for n, s in zip(self.experts, scores, strict=True))
        facts = (("strangest at", self.strangest), ("there", f"{shown} deviations"))
        return Summary(f"Novelty: {known} (threshold {self.threshold:g})", facts)

    def rows(self) -> list[dict[str, Any]]:
        """One row per module, a column per expert."""
        return [
            {"module": module, **dict(zip(self.experts, row, strict=True))}
            for module, row in zip(self.modules, self.scores, strict=True)
        ]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "schema": 1,
            "new": self.is_new,
            "strangest": self.strangest,
            "threshold": self.threshold,
            "new_rows": [number + 1 for number in self.new_rows],
            "nearest": [self.nearest(number) for number in range(len(self.texts))],
            "scores": {
                module: dict(zip(self.experts, row, strict=True))
                for module, row in zip(self.modules, self.scores, strict=True)
            },
        }


def default_modules(mixture: Mixture) -> list[str]:
    """One module per layer, the narrowest: the first in natural order that reads the fewest."""
    chosen: dict[str, tuple[int, str]] = {}
    for module in natural(mixture.modules):
        width = next(m.first.d_in for m in mixture.alignment.modules if m.name == module)
        layer = layer_of(module)
        if layer not in chosen or width < chosen[layer][0]:
            chosen[layer] = (width, module)
    return [module for _, module in chosen.values()]


def describe(
    model: nn.Module,
    mixture: Mixture,
    examples: Sequence[Example],
    *,
    modules: Sequence[str] | None = None,
    rank: int = 8,
    batch_size: int = 8,
) -> Descriptors:
    """Describe every expert that has rows; others keep what is known of them.

    The first half of an expert's rows fits its autoencoder, the second half says how large errors
    are on texts it was not fitted to.

    Args:
        model: Base model without an active mixture.
        mixture: The mixture; its own descriptors are the ones that are kept.
        examples: Rows that name their expert.
        modules: Whose inputs; default: those already described, or one per layer.
        rank: Width of the autoencoder.
        batch_size: Rows of one pass.

    Raises:
        MethodError: If an expert has fewer than four rows, the modules are not the old ones, or the
            rank is not below their width.
    """
    known = mixture.descriptors
    places = list(modules or (known.modules if known else default_modules(mixture)))
    if known is not None and set(places) != set(known.modules):
        raise MethodError(
            "the experts that are described already are described at other modules",
            f"describe at {', '.join(known.modules[:3])}, ...",
        )
    unknown = [name for name in places if name not in mixture.modules]
    if unknown:
        raise MethodError(f"the mixture has no module {unknown[0]}", "name one that it wraps")
    found = known or Descriptors((), {})
    for index, name in enumerate(mixture.names):
        rows = [e for e in examples if e.expert == index]
        if not rows:
            continue
        if len(rows) < 4:
            raise MethodError(f"{name} has {len(rows)} rows", "give it at least four")
        found = found.with_expert(name, _describe(model, mixture, rows, places, rank, batch_size))
    if not found.experts:
        raise MethodError("no row names its expert", 'add "expert" to the rows')
    return found


def novelty(
    model: nn.Module,
    mixture: Mixture,
    examples: Sequence[Example],
    *,
    threshold: float = 1.5,
    batch_size: int = 8,
) -> Novelty:
    """Whether texts are of a kind that some described expert knows.

    Args:
        model: Base model without an active mixture.
        mixture: With descriptors.
        examples: The texts, of one kind or several: each is judged by itself.
        threshold: Deviations that make a text strange to a descriptor.
        batch_size: Rows of one pass.

    Raises:
        MethodError: If no expert is described, or the threshold is no number.
    """
    if not math.isfinite(threshold):
        raise MethodError(f"the threshold is {threshold}", "a number, such as 1.5")
    known = mixture.descriptors
    if known is None:
        raise MethodError("no expert is described", "run `lora-merge describe` first")
    errors: dict[str, list[Tensor]] = {name: [] for name in known.modules}

    def add(name: str, rows: Sequence[Tensor]) -> None:
        errors[name] += [known.errors(name, x).double().cpu() for x in rows]

    _watch(model, mixture, examples, known.modules, add, batch_size)
    scores = []  # (rows, experts) of each module
    for name in known.modules:
        mean, deviation = known.tensors[f"{name}.error"].double().unbind(1)
        scores.append((torch.stack(errors[name]) - mean) / deviation)
    together = tuple(tuple(each.mean(0).tolist()) for each in scores)
    by_row = torch.stack(scores, dim=1).tolist()
    rows = tuple(tuple(map(tuple, row)) for row in by_row)
    return Novelty(tuple(known.modules), known.experts, together, threshold, rows)


def _describe(
    model: nn.Module,
    mixture: Mixture,
    rows: Sequence[Example],
    modules: Sequence[str],
    rank: int,
    batch_size: int,
) -> dict[str, Tensor]:
    """One expert's mean, basis and error by module."""
    half = len(rows) // 2
    moments: dict[str, tuple[int, Tensor, Tensor]] = {}

    def collect(name: str, texts: Sequence[Tensor]) -> None:
        x = torch.cat(list(texts)).double()
        count, first, second = moments.get(name, (0, torch.tensor(0.0), torch.tensor(0.0)))
        moments[name] = (count + len(x), first.to(x) + x.sum(0), second.to(x) + x.mT @ x)

    _watch(model, mixture, rows[:half], modules, collect, batch_size)
    tensors: dict[str, Tensor] = {}
    least: dict[str, float] = {}
    for name, (count, first, second) in moments.items():
        if rank >= len(first):
            raise MethodError(
                f"rank {rank} keeps all of {name}'s {len(first)} inputs, so no text is strange",
                "take a smaller rank",
            )
        mean = first / count
        covariance = second / count - torch.outer(mean, mean)
        least[name] = _LEAST_SPREAD * float(covariance.trace())
        vectors = torch.linalg.eigh(covariance).eigenvectors
        tensors[f"{name}.mean"] = mean.float().cpu()
        tensors[f"{name}.basis"] = vectors[:, -rank:].mT.flip(0).float().cpu().contiguous()
    one = Descriptors(("",), {key: tensor[None] for key, tensor in tensors.items()})
    errors: dict[str, list[float]] = {name: [] for name in modules}

    def measure(name: str, texts: Sequence[Tensor]) -> None:
        errors[name] += [float(one.errors(name, x)) for x in texts]

    _watch(model, mixture, rows[half:], modules, measure, batch_size)
    for name, values in errors.items():
        own = torch.tensor(values, dtype=torch.float64)
        spread = own.std().clamp_min(max(least[name], 1e-12))
        tensors[f"{name}.error"] = torch.stack([own.mean(), spread]).float()
    return tensors


@torch.no_grad()
def _watch(
    model: nn.Module,
    mixture: Mixture,
    examples: Sequence[Example],
    modules: Sequence[str],
    look: Callable[[str, Sequence[Tensor]], None],
    batch_size: int,
) -> None:
    """Call `look` with each module's inputs, one (tokens, d) tensor per text without padding."""
    targets = find_targets(model, mixture)
    batch: Batch | None = None

    def hook_of(name: str) -> Any:
        def hook(target: nn.Module, args: tuple[Any, ...]) -> None:
            if batch is not None:
                pairs = zip(args[0], batch.mask, strict=True)
                look(name, [x[mask.bool()].float() for x, mask in pairs])

        return hook

    handles = [targets[name].register_forward_pre_hook(hook_of(name)) for name in modules]
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    try:
        for batch in in_order(examples, batch_size):
            batch = batch.to(device)
            model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False)
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()
