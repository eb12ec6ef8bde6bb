"""The rows of the table in docs/kernels.md: what is timed, and what the aim is."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Case:
    """One row.

    Attributes:
        name: Short name.
        title: What the table says.
        kind: "decode", "prefill", "generate", "inactive", "training" or "cluster".
        experts: Experts of the mixture, or adapters to cluster.
        rank: Rank of each.
        aim: What the ratio should not exceed, or not fall below if `faster`.
        tokens: Sequences that decode one token each, or tokens of a prompt.
        top_k: Experts kept per token; None keeps all.
        graph: Timed as a CUDA graph, where there is a GPU.
        steps: Every candidate, the base too, generates with `graph=True`, where there is a GPU.
        against: Gate of PEFT's that the row compares with.
        distilled: The gate is what distillation makes of it: rows in each module.
        faster: The ratio is how many times faster than the reference.
    """

    name: str
    title: str
    kind: str
    experts: int
    rank: int
    aim: float
    tokens: int = 1
    top_k: int | None = None
    graph: bool = False
    steps: bool = False
    against: str = ""
    distilled: bool = False
    faster: bool = False

    @property
    def reference(self) -> str:
        """The candidate that ratios are to: the base model, or PEFT's."""
        return "peft" if self.against or self.kind == "training" else "base"

    def ratio(self, seconds: float, reference: float) -> float:
        """The number that stands in the table."""
        return reference / seconds if self.faster else seconds / reference


CASES = (
    Case("decode-1-dense", "decode, 1 token, 28 x r8, dense gate", "decode", 28, 8, 1.09,
         graph=True),
    Case("decode-1-top2", "decode, 1 token, 28 x r8, top-2", "decode", 28, 8, 1.06, top_k=2,
         graph=True),
    Case("decode-16-top2", "decode, 16 tokens, 28 x r8, top-2", "decode", 28, 8, 1.08, tokens=16,
         top_k=2, graph=True),
    Case("generate-steps", "decode, 1 token, 8 x r16, generate, a graph per step", "generate", 8,
         16, 1.10, steps=True),
    Case("prefill-dense", "prefill, 4096 tokens, 28 x r8", "prefill", 28, 8, 1.10, tokens=4096),
    Case("prefill-top2", "prefill, 4096 tokens, 64 x r16, top-2", "prefill", 64, 16, 1.18,
         tokens=4096, top_k=2),
    Case("inactive", "decode, 1 token, mixture switched off, no graph", "inactive", 8, 16, 1.005),
    Case("generate", "decode, 1 token, 8 x r16, generate, no graph", "generate", 8, 16, 1.35),
    Case("cluster", "cluster 64 adapters r16, against reading them", "cluster", 64, 16, 1.5),
    Case("training", "gate training step, 8 x r16, against one PEFT LoRA", "training", 8, 16, 0.8),
    Case("against-arrow", "against PEFT Arrow, 4 x r16, top-2, 128 tokens after 512", "generate", 4,
         16, 4.0, top_k=2, against="arrow", faster=True),
    Case("against-xlora", "against PEFT X-LoRA, 4 x r16, same", "generate", 4, 16, 10.0,
         against="xlora", faster=True),
    Case("against-xlora-distilled", "the same, ours distilled", "generate", 4, 16, 20.0,
         against="xlora", distilled=True, faster=True),
)  # fmt: skip
