"""Where modules that share an input keep their experts and their gate, and which unit is whose."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from lora_merge.kernels.gated_stack.base_matrix import Joined
from lora_merge.kernels.gated_stack.gpu.fused import refusal
from lora_merge.mixture.runtime.call.in_force import Switch
from lora_merge.mixture.runtime.precision import kept_precise
from lora_merge.mixture.runtime.wrapped.by_kernel import Plan
from lora_merge.mixture.runtime.wrapped.member import Member


class PackedMembers(nn.Module):
    """Experts and gates of wrapped modules that share an input.

    `down` and `weight` are views of one packed matrix, so that without gradients the shrink of all
    members and all their gates is a single product. Parameters are what training may change.

    Args:
        members: Modules of one form and input width.
        switch: Of the mixture.
        num_experts: Gated experts of the mixture.
        num_general: General experts of the mixture.
    """

    down: nn.Parameter
    weight: nn.Parameter | None
    rank_gates: nn.Parameter | None  # one factor per unit while SoRA trains

    def __init__(
        self,
        members: Sequence[Member],
        switch: Switch,
        *,
        num_experts: int,
        num_general: int = 0,
        gate_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.switch, self._spec = switch, switch.default.spec
        self.names = [m.name for m in members]
        self.experts = [m.experts for m in members]
        self.output_scales = [m.output_scale for m in members]
        self.form = members[0].form
        self.num_general = num_general
        self.down = nn.Parameter(torch.cat([m.down for m in members]), requires_grad=False)
        for index, member in enumerate(members):
            up = nn.Parameter(member.up.contiguous(), requires_grad=False)
            self.register_parameter(f"up{index}", up)
        rows = [m.rows for m in members if m.rows is not None]
        weight = torch.cat(rows).to(gate_dtype or self.down.dtype) if rows else None
        self.weight = None if weight is None else nn.Parameter(weight, requires_grad=False)
        self.register_parameter("rank_gates", None)
        self.units = list(accumulate([len(m.owner) for m in members], initial=0))
        self.scores = list(accumulate([len(r) for r in rows], initial=0))
        self._layout(members, num_experts)
        empty = self.down.new_empty(0)
        self._made_of = [replace(m, down=empty, up=empty) for m in members]
        self._packed: Tensor | None = None
        self._pack()

    def _layout(self, members: Sequence[Member], num_experts: int) -> None:
        """Precompute which weight each unit takes."""
        device = self.down.device

        def constant(name: str, value: Tensor | None) -> None:
            self.register_buffer(name, value, persistent=False)

        biases = [m.bias for m in members if m.bias is not None]
        spectra = [m.spectrum for m in members if m.spectrum is not None]
        constant("bias", torch.cat(biases).float() if biases else None)
        constant("spectrum", torch.cat(spectra).to(self.down.dtype) if spectra else None)
        places: list[list[int]] = []
        for member in members:
            order = {e: i for i, e in enumerate((*member.experts, *member.general))}
            places.append([order[owner] for owner in member.owner])
        self.widths = [len(m.experts) + len(m.general) for m in members]
        self.uniform = len({(m.experts, m.general, m.owner) for m in members}) == 1
        counts = {p.count(i) for p, w in zip(places, self.widths, strict=True) for i in range(w)}
        self.block = counts.pop() if len(counts) == 1 else None
        starts = list(accumulate(self.widths, initial=0))
        for index, part in enumerate(places):
            constant(f"columns{index}", torch.tensor(part, device=device))
        joined = [p + starts[i] for i, part in enumerate(places) for p in part]
        constant("columns", torch.tensor(joined, device=device))
        spec = self._spec
        per_module = spec.granularity != "model" and spec.signal == "hidden"
        for index, member in enumerate(members):
            offset = member.number * num_experts if per_module else 0
            taken = [offset + e for e in member.experts]
            constant(f"outside{index}", torch.tensor(taken, dtype=torch.int64, device=device))

    def members(self) -> list[Member]:
        """The modules as they are now; tensors are views of what runs."""
        found = []
        spectrum: Any = self.spectrum
        for index, member in enumerate(self._made_of):
            units = slice(*self.units[index : index + 2])
            scores = slice(*(self.scores[index : index + 2] or (0, 0)))
            now = replace(
                member,
                down=self.down.data[units],
                up=self._ups[index].data,
                rows=None if self.weight is None else self.weight.data[scores],
                spectrum=None if spectrum is None else spectrum[units],
            )
            found.append(now)
        return found

    def gate_of(self, start: int, stop: int) -> tuple[Tensor, Tensor | None]:
        """Gate rows of members start..stop, and their bias for the selection."""
        assert self.weight is not None
        rows = self.weight[self.scores[start] : self.scores[stop]]
        bias = self.bias
        own = bias[self.units[start] : self.units[stop]] if isinstance(bias, Tensor) else None
        return rows, own

    def taken_by(self, member: int) -> Tensor:
        """Columns of weights decided outside that a member takes, int64, shape (E,)."""
        taken: Tensor = getattr(self, f"outside{member}")
        return taken

    def gate_bias(self, start: int, stop: int) -> Tensor | None:
        """The bias for the selection as the scores stand, shape (M, n)."""
        bias = self.bias
        if not isinstance(bias, Tensor):
            return None
        return bias[self.units[start] : self.units[stop]].view(stop - start, -1)

    def columns_of(self, start: int, count: int = 1) -> Tensor:
        """Place of each unit's expert among the members' experts, int64, shape (units,)."""
        columns: Tensor = getattr(self, "columns" if count > 1 else f"columns{start}")
        return columns

    def factors(self) -> tuple[list[Tensor], Tensor, Tensor | None]:
        """Every up, down, and the gate's rows if they ride along in the shrink (of one dtype)."""
        ups, down, weight = [up.data for up in self._ups], self.down.data, self.weight
        rides = weight is not None and weight.dtype == down.dtype
        return ups, down, weight.data if weight is not None and rides else None

    def adopt(self, joined: Joined) -> None:
        """Take the place of experts and gate in a matrix that holds the base weights too."""
        for up, view in zip(self._ups, joined.ups, strict=True):
            up.data = view
        self.down.data = joined.down
        if self.weight is not None and joined.scores == len(self.weight):
            self.weight.data = joined.gate
            self._remember(joined.rows[joined.outputs[-1] :])

    def _pack(self) -> None:
        """Make `down` and `weight` views of one matrix (same dtype only: half gates stay apart)."""
        # Plain references: looking a parameter up by name is slow, and there are many per token.
        self._ups = [getattr(self, f"up{index}") for index in range(len(self.names))]
        self.has_kernel = not refusal(self.down.device, self.down.dtype)
        self.plans: dict[tuple[Any, ...], Plan] = {}
        self._rows = (self.down, self.weight)
        self._held = tuple(t for t in (*self._rows, *self._ups) if t is not None)
        self._packed = None
        _, down, weight = self.factors()
        if self.weight is not None and weight is not None:
            packed = torch.cat([down, weight])
            self.down.data, self.weight.data = packed.split([len(down), len(weight)])
            self._remember(packed)

    def _remember(self, packed: Tensor) -> None:
        """Keep the matrix whose rows `down` and `weight` are."""
        self._packed = packed
        self._addresses = [rows.data_ptr() for rows in self._rows if rows is not None]

    def __getstate__(self) -> dict[str, Any]:
        """What a copy or a file needs: the packed matrix holds nothing of its own."""
        return {**self.__dict__, "_packed": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Pack again what a copy or a file brought one by one."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._pack()

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "PackedMembers":
        """Keep the views after `.to`, `.half` and the like, which convert them one by one."""
        with kept_precise(self, "weight", "bias"):
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._pack()
        return self

    def is_packed(self) -> bool:
        """Whether the packed matrix is what the parameters hold (a deep copy separates them)."""
        return self.packed() is not None

    def packed(self) -> Tensor | None:
        """The matrix of `down` and the gate's rows, while the parameters are views of it."""
        down, weight = self._rows
        if self._packed is None or weight is None:
            return None
        same = [down.data_ptr(), weight.data_ptr()] == self._addresses
        return self._packed if same else None
