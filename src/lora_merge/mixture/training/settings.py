"""How a gate is trained."""

import math
from dataclasses import dataclass

from lora_merge.errors import MethodError

_AT_LEAST_0 = (
    "lr", "weight_decay", "clip", "task_loss", "balance_loss", "z_loss", "bias_rate", "expert_lr",
    "rank_l1",
)  # fmt: skip


@dataclass(frozen=True)
class TrainSettings:
    """How to train.

    Attributes:
        steps: Optimizer steps.
        batch_size: Rows of one pass, over all processes together.
        accumulate: Passes per step.
        lr: Peak learning rate of the gate. None takes 5e-3, 2e-3 for gates over single ranks, and
            1e-3 for a classifier that was fitted to labels first.
        warmup: Steps of linear warm-up.
        schedule: "cosine" to a tenth of the peak, or "constant".
        weight_decay: AdamW's, on the gate.
        clip: Largest norm of the gradient; 0 for none.
        task_loss: Coefficient of the gate's own cross-entropy on labelled tokens (MeteoRA has 50).
            None takes 1 where rows are labelled and the gate weighs experts, else 0.
        balance_loss: Coefficient of the load balance loss.
        z_loss: Coefficient of the squared log-partition of the scores.
        bias_rate: Step of a rank gate's selection bias against its load.
        train_experts: Train the experts' factors as well; they are saved as new adapters.
        expert_lr: Peak learning rate of the factors.
        rank_l1: SoRA: a rank is pruned if the loss would gain less than this, in nats per token and
            unit of the rank's weight; 0 prunes none.
        rank_lr: Step of the proximal gradient; None takes 2 / (rank_l1 * steps), with which a rank
            without any gradient reaches zero soon after half of the steps.
        bf16: Autocast the passes to bfloat16; the gate's weights stay float32.
        seed: Of the order of the rows and of dropout.
        save_every: Steps between checkpoints; 0 for none but the last.
        eval_every: Steps between evaluations; 0 for the last step only.
    """

    steps: int = 200
    batch_size: int = 8
    accumulate: int = 1
    lr: float | None = None
    warmup: int = 10
    schedule: str = "cosine"
    weight_decay: float = 0.01
    clip: float = 1.0
    task_loss: float | None = None
    balance_loss: float = 0.0
    z_loss: float = 0.0
    bias_rate: float = 0.0
    train_experts: bool = False
    expert_lr: float = 1e-4
    rank_l1: float = 0.0
    rank_lr: float | None = None
    bf16: bool = False
    seed: int = 0
    save_every: int = 50
    eval_every: int = 0

    def __post_init__(self) -> None:
        """Refuse settings that cannot mean anything."""
        for name in _AT_LEAST_0:
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise MethodError(f"{name} is {value}", "a number, at least 0")
        for name in ("steps", "batch_size", "accumulate"):
            if getattr(self, name) < 1:
                raise MethodError(f"{name} is {getattr(self, name)}", "at least 1")
        if self.schedule not in ("cosine", "constant"):
            raise MethodError(f"schedule is {self.schedule}", "cosine or constant")
        if self.rank_lr is not None and not 0 < self.rank_lr < math.inf:
            raise MethodError(f"rank_lr is {self.rank_lr}", "a number above 0")

    @property
    def rank_step(self) -> float:
        """Peak step of the proximal gradient."""
        if self.rank_lr is not None or not self.rank_l1:
            return self.rank_lr or 0.0
        return 2.0 / (self.rank_l1 * self.steps)

    @property
    def changes_experts(self) -> bool:
        """Whether the trained mixture has experts of its own."""
        return self.train_experts or self.rank_l1 > 0

    def of_loss(self, name: str) -> float:
        """Coefficient of a loss term: "loss", "task", "balance" or "z"."""
        return 1.0 if name == "loss" else float(getattr(self, f"{name}_loss") or 0.0)
