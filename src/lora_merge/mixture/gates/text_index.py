"""An index over what experts are for: one vector of the texts of each, against a prompt's.

LoraRetriever (arXiv 2402.09997) and LORAUTER (2601.21795) choose adapters by the similarity of a
prompt to a few texts of each adapter, as a sentence encoder sees them. Here a text is the mean of
the model's own token embeddings, which costs nothing beside a pass of the model: both sides are
centred and scaled by what differs between texts of one expert, and compared by their cosine.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lora_merge.mixture.gates.memory import over_prompt

CENTRE, SCALE, DESCRIPTORS = "text.centre", "text.scale", "text.descriptors"
_LEAST = 1e-6


class TextIndex(nn.Module):
    """Descriptors of experts, ready to be compared.

    Args:
        gate: `text.centre` (d,), `text.scale` (d,) and `text.descriptors` (E, d).
        device: Where the model's embeddings are.
    """

    centre: Tensor
    scale: Tensor
    rows: Tensor

    def __init__(self, gate: Mapping[str, Tensor], device: torch.device) -> None:
        super().__init__()
        centre, scale, descriptors = (gate[n].to(device) for n in (CENTRE, SCALE, DESCRIPTORS))
        rows = functional.normalize((descriptors - centre) / scale, dim=-1)
        for name, value in (("centre", centre), ("scale", scale), ("rows", rows)):
            self.register_buffer(name, value.float(), persistent=False)

    def _apply(self, fn: Any, recurse: bool = True) -> "TextIndex":
        """Follow the model to other devices, and to no half precision."""
        before = dict(self.named_buffers())
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in before.items():
            setattr(self, name, buffer.to(getattr(self, name).device))
        return self

    def forward(
        self, states: Tensor, counts: Tensor | None = None, documents: Tensor | None = None
    ) -> Tensor:
        """Cosine of each text and each expert.

        Args:
            states: Token embeddings, shape (B, S, d).
            counts: Which tokens count, bool, shape (B, S); None for all.
            documents: Number of the text that each token belongs to, shape (B, S).

        Returns:
            Shape (B, E); with documents that of each token's own, (B, S, E).
        """
        text = over_prompt(states.float()[:, :, None], counts, documents)[..., 0, :]
        text = functional.normalize((text - self.centre) / self.scale, dim=-1)
        scores: Tensor = text @ self.rows.mT
        return scores


def text_gate(texts: Sequence[Tensor]) -> dict[str, Tensor]:
    """The index of experts from vectors of their texts.

    Args:
        texts: Of each expert, mean token embeddings of its texts, shape (n_e, d), n_e at least 1.
    """
    means = torch.stack([rows.double().mean(0) for rows in texts])
    centre = means.mean(0)
    away = torch.cat([rows.double() - mean for rows, mean in zip(texts, means, strict=True)])
    spread = away.square().mean(0).sqrt()
    if len(away) == len(means):  # one text each: nothing is known of what differs within
        spread = (means - centre).square().mean(0).sqrt()
    scale = spread.clamp_min(max(_LEAST, 0.1 * float(spread.mean())))
    gate = {CENTRE: centre, SCALE: scale, DESCRIPTORS: means}
    return {name: tensor.float() for name, tensor in gate.items()}


def empty_gate(num_experts: int, width: int) -> dict[str, Tensor]:
    """An index that knows nothing yet."""
    descriptors = torch.zeros(num_experts, width)
    return {CENTRE: torch.zeros(width), SCALE: torch.ones(width), DESCRIPTORS: descriptors}
