"""Every gate as its paper writes it, in float64, row by row and token by token, without a cache."""

from collections.abc import Callable
from typing import Any

import torch
from oracle import expert_delta, scores_of
from torch import Tensor, nn

from lora_merge.mixture.mixture import Mixture

READ = ("input_ids", "inputs_embeds", "pixel_values")


def softmax_of_kept(scores: Tensor, top_k: int, temperature: float) -> Tensor:
    """Token by token, expert by expert, with a gradient."""
    rows = []
    for row in scores:
        kept = sorted(range(len(row)), key=lambda e: -float(row[e]))[:top_k]
        powers = ((row - row.max()) / temperature).exp()
        total = sum(powers[e] for e in kept)
        shares = [powers[e] / total for e in range(len(row))]
        rows.append(torch.stack([s if e in kept else 0 * s for e, s in enumerate(shares)]))
    return torch.stack(rows)


class Loop:
    """A loop over experts, hooked into a float64 model that is always given whole texts.

    Args:
        model: Becomes the mixture.
        base: The same model, for the first pass of a two-pass gate.
        mixture: What to run.

    Attributes:
        prompt: Tokens that a gate per sequence decides on; None for all.
        requests: One expert's number, or None, for each row.
    """

    def __init__(self, model: nn.Module, base: nn.Module, mixture: Mixture) -> None:
        self.mixture, self.base = mixture, base
        self.prompt: int | None = None
        self.requests: list[int | None] = [None]
        self.inputs: dict[str, Any] = {}
        self.numbers = {name: n for n, name in enumerate(mixture.modules)}
        self.scores: dict[int, Tensor] = {}
        self.parts: dict[str, Any] = {}
        self.tops: dict[str, Any] = {}

        def look(target: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.inputs, self.scores = dict(kwargs), {}
            if args:
                self.inputs["input_ids"] = args[0]

        model.register_forward_pre_hook(look, with_kwargs=True)
        self.attach(model)

    def attach(self, model: nn.Module) -> None:
        for module in self.mixture.alignment.modules:
            hook = self.hook(module.name, list(module.specs))
            model.get_submodule(module.name).register_forward_hook(hook)

    def hook(self, name: str, present: list[int]) -> Callable[..., Tensor]:
        def run(target: nn.Module, args: tuple[Tensor], y: Tensor) -> Tensor:
            x = args[0].reshape(len(args[0]), -1, args[0].shape[-1])
            rows = [self.row(name, present, x[i], i) for i in range(len(x))]
            return y + torch.stack(rows).view(y.shape)

        return run

    def row(self, name: str, present: list[int], x: Tensor, number: int) -> Tensor:
        """What the experts add for one text (S, d)."""
        spec = self.mixture.spec
        if spec.granularity == "rank":
            return self.of_ranks(name, present, x)
        if spec.signal == "constant":
            weights = torch.tensor([[spec.weights[e] for e in present]] * len(x))
        elif spec.signal == "request":
            wanted = self.requests[number * len(self.requests) // self.batch]
            weights = torch.tensor([[float(e == wanted) for e in present]] * len(x))
        elif spec.signal == "hidden":
            weights = self.of_hidden(name, number)[:, present]
        elif spec.signal == "text":
            weights = self.of_text(number, len(x))[:, present]
        else:
            scores = scores_of(self.mixture, name, present, x)
            if spec.sequence:
                scores = scores[: self.prompt].mean(0, keepdim=True).expand_as(scores)
            top_k = spec.top_k or len(present)
            weights = softmax_of_kept(self.remembered(scores), top_k, spec.temperature)
        return self.weighted(name, present, x, weights)

    def weighted(self, name: str, present: list[int], x: Tensor, weights: Tensor) -> Tensor:
        """The experts' deltas for tokens (S, d) under weights (S, E)."""
        total = torch.zeros(())
        for place, e in enumerate(present):
            delta = expert_delta(self.mixture.experts[e].adapter, name, x)
            total = total + weights[:, place : place + 1].to(x) * delta
        return total

    @property
    def batch(self) -> int:
        given = self.inputs.get("input_ids")
        return len(self.inputs["inputs_embeds"] if given is None else given)

    def remembered(self, scores: Tensor) -> Tensor:
        state, rows = torch.zeros_like(scores[0]), []
        for row in scores:
            state = self.mixture.spec.memory * state + row
            rows.append(state)
        return torch.stack(rows)

    def of_hidden(self, name: str, number: int) -> Tensor:
        """Weights (S, E) of one text by the base's last hidden states."""
        spec = self.mixture.spec
        if number not in self.scores:
            self.scores[number] = self.scored(number)
        place = self.numbers[name] if spec.granularity == "module" else 0
        return torch.softmax(self.remembered(self.scores[number][:, place]), -1)

    def scored(self, number: int) -> Tensor:
        """The classifier's scores (S, modules, E) of one text."""
        spec, gate = self.mixture.spec, self.mixture.gate
        given = {k: v for k, v in self.inputs.items() if k in READ}
        with torch.no_grad():  # the first pass is looked at, and not trained
            state = self.base.base_model(**given, use_cache=False)[0][number]
        for layer in range(spec.depth):
            weight, bias = (gate[f"classifier.{layer}.{n}"].double() for n in ("weight", "bias"))
            state = (state.relu() if layer else state) @ weight.T + bias
        return state.view(len(state), -1, self.mixture.num_experts)

    def of_text(self, number: int, length: int) -> Tensor:
        """One expert for a whole text (S, E), by the mean of its prompt's embeddings."""
        states = self.inputs.get("inputs_embeds")
        if states is None:
            states = self.base.get_input_embeddings()(self.inputs["input_ids"])
        gate = {n.removeprefix("text."): t.double() for n, t in self.mixture.gate.items()}
        text = (states[number][: self.prompt].mean(0) - gate["centre"]) / gate["scale"]
        best, chosen = None, 0
        for e, descriptor in enumerate(gate["descriptors"]):
            other = (descriptor - gate["centre"]) / gate["scale"]
            cosine = float(text @ other / (text.norm() * other.norm()))
            if best is None or cosine > best:
                best, chosen = cosine, e
        return torch.eye(self.mixture.num_experts)[chosen].expand(length, -1)

    def of_ranks(self, name: str, present: list[int], x: Tensor) -> Tensor:
        """What single ranks add: SMoRA's, or the strongest."""
        spec, gate = self.mixture.spec, self.mixture.gate
        if name not in self.parts:
            self.parts[name] = list(self.units(name, present))
        units = self.parts[name]
        rows = []
        for token in x:
            if spec.signal == "spectrum":
                scores = torch.stack([(s * (a @ token)).abs() for a, _, s in units])
                judged = scores
            else:
                scores = gate[f"{name}.weight"].double() @ token
                judged = scores + gate[f"{name}.rank_bias"].double()
            kept = judged.topk(min(spec.top_k or len(units), len(units))).indices.tolist()
            top = scores.max()  # or exp overflows
            total = sum((scores[j] - top).exp() for j in kept)
            out = torch.zeros(())
            for j in kept:
                a, b, s = units[j]
                w = 1.0 if spec.value == "binary" else len(kept) * (scores[j] - top).exp() / total
                out = out + w * s * (a @ token) * b
            rows.append(out)
        return torch.stack(rows)

    def units(self, name: str, present: list[int]) -> Any:
        for e in present:
            adapter = self.mixture.experts[e].adapter
            a, b = (t.double() for t in adapter.read(name))
            scaling = adapter.modules[name].scaling
            if self.mixture.spec.signal == "spectrum":
                u, s, v = torch.linalg.svd(scaling * b @ a)
                yield from ((v[j], u[:, j], s[j]) for j in range(len(a)))
            else:
                yield from ((a[j], b[:, j], scaling) for j in range(len(a)))
