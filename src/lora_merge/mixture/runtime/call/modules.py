"""What has to be known of wrapped modules to decide for them; `wrapped.group.Group` is one.

Passes are `passes.Pass`, which knows of modules itself, so that this file cannot know it.
"""

from typing import Any, Protocol

from torch import Tensor


class Modules(Protocol):
    """Wrapped modules that share an input.

    Attributes:
        names: Their paths in the model.
        experts: Gated experts of each.
        form: "linear", "embedding" or "conv".
        down: Rows of every A, shape (R, d_in).
        units: Where each member's units begin, and where the last's end.
        widths: Weights of each member, the general experts' among them.
        block: Units per weight if all weights cover equally many, in order; else None.
        uniform: Whether all are alike.
        num_general: General experts of the mixture.
        has_kernel: Whether a kernel can run on their device and dtype.
        is_routed: Whether their input is tokens that somebody has sorted.
        rank_gates: One factor per unit while SoRA trains.
        plans: What runs them, by case.
        bias: Of the scores, for the selection alone, shape (R,), or None.
    """

    names: list[str]
    experts: list[tuple[int, ...]]
    form: str
    units: list[int]
    widths: list[int]
    block: int | None
    uniform: bool
    num_general: int
    has_kernel: bool
    is_routed: bool
    plans: dict[tuple[Any, ...], Any]

    @property
    def down(self) -> Tensor: ...  # noqa: D102
    @property
    def rank_gates(self) -> Tensor | None: ...  # noqa: D102
    @property
    def bias(self) -> Any: ...  # noqa: D102

    def factors(self) -> tuple[list[Tensor], Tensor, Tensor | None]:
        """Every up, down, and the gate's rows if they ride along in the shrink."""

    def columns_of(self, start: int, count: int = 1) -> Tensor:
        """Place of each unit's expert among the members' experts, int64, shape (units,)."""

    def taken_by(self, member: int) -> Tensor:
        """Columns of weights decided outside that a member takes, int64, shape (E,)."""

    def gate_of(self, start: int, stop: int) -> tuple[Tensor, Tensor | None]:
        """Gate rows of members start..stop, and their bias for the selection."""

    def gate_bias(self, start: int, stop: int) -> Tensor | None:
        """The bias for the selection as the scores stand, shape (M, n)."""

    def scores_of(self, passed: Any, x: Tensor, start: int, stop: int) -> Tensor:
        """Scores of any tokens, shape (T, M, n)."""

    def weights_of(self, passed: Any, x: Tensor, start: int, stop: int) -> Tensor:
        """Weights of members start..stop, where they need no units, shape (T', M C)."""

    def add(self, passed: Any, index: int, x: Tensor, y: Tensor, *, in_place: bool) -> Tensor:
        """Add the experts of member `index` to its output."""

    def settle(self) -> None:
        """Look once, before a call of the model, at what does not change inside of it."""
