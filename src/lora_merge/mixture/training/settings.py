"""How a gate is trained."""

from dataclasses import dataclass
from typing import Literal

from lora_merge.errors import MethodError
from lora_merge.options import LARGEST_SEED, check_options, option

_LARGEST = 1e30  # what an optimizer's float32 bears


@dataclass(frozen=True)
class TrainSettings:
    """How to train."""

    steps: int = option(200, "optimizer steps", low=1)
    # Over all processes together.
    batch_size: int = option(8, "rows of one pass", low=1)
    accumulate: int = option(1, "passes per step", low=1)
    lr: float | None = option(
        None,
        "peak learning rate of the gate",
        low=0,
        unset="5e-3; 2e-3 for gates over ranks, 1e-3 for a classifier fitted to labels first",
    )
    warmup: int = option(10, "steps of linear warm-up", low=0)
    schedule: Literal["cosine", "constant"] = option(
        "cosine", "of the learning rate: down to a tenth of its peak, or constant"
    )
    weight_decay: float = option(0.01, "AdamW's, on the gate", low=0)
    clip: float = option(1.0, "largest norm of the gradient; 0 for none", low=0)
    # On labelled tokens; MeteoRA has 50.
    task_loss: float | None = option(
        None,
        "coefficient of the gate's own cross-entropy on rows with an expert",
        low=0,
        unset="1 where rows have one and the gate weighs experts, else 0",
    )
    balance_loss: float = option(0.0, "coefficient of the load balance loss", low=0)
    z_loss: float = option(0.0, "coefficient of the squared log-partition of the scores", low=0)
    bias_rate: float = option(
        0.0, "step of a rank gate's selection bias against its load (smora)", low=0
    )
    train_experts: bool = option(False, "train the experts as well; they are saved as new adapters")
    expert_lr: float = option(1e-4, "peak learning rate of the experts' factors", low=0)
    # In nats per token and unit of the rank's weight.
    rank_l1: float = option(
        0.0, "prune ranks whose loss gain per unit of weight is below this (SoRA); 0: none", low=0
    )
    # With 2 / (rank_l1 * steps) a rank without any gradient reaches 0 soon after half of the steps.
    rank_lr: float | None = option(
        None, "step of the proximal gradient", above=0, unset="2 / (rank_l1 * steps)"
    )
    bf16: bool = option(False, "run the passes in bfloat16; the gate's weights stay float32")
    seed: int = option(0, "of the order of the rows and of dropout", low=0, high=LARGEST_SEED)
    save_every: int = option(50, "steps between checkpoints; 0 for none but the last", low=0)
    eval_every: int = option(0, "steps between evaluations; 0 for the last step only", low=0)

    def __post_init__(self) -> None:
        """Refuse settings that cannot mean anything."""
        check_options(self, "a training")
        for name, value in vars(self).items():
            if isinstance(value, float) and value > _LARGEST:
                raise MethodError(f"{name} is {value:g}", f"{_LARGEST:g} at most")

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
