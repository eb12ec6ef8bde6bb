"""What a group does for tokens that are each decided alone, prepared once: decoding on a CPU.

While decoding, all weights stream through the caches between any two modules, so every operation
and every line of Python is paid for cold. Whatever does not depend on the token is worked out when
a gate first meets a group; the gate of a lone token is worked out in numbers; and experts that it
gives no weight are not read at all.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.nn import functional

from lora_merge.kernels import gated_stack
from lora_merge.kernels.gated_stack.eager import gate_units
from lora_merge.kernels.gated_stack.gate import kept_of, kept_of_one
from lora_merge.mixture.gates.gate import GateSpec
from lora_merge.mixture.gates.layer_norm import inverse_deviation
from lora_merge.mixture.runtime.call.passes import Pass
from lora_merge.mixture.runtime.wrapped.packed_members import PackedMembers

Term = tuple[Tensor, Tensor, float]  # units (T, r), rows of up (r, d_out), what multiplies them
_Kept = list[list[tuple[int, float]]]  # of each member: experts that have a weight, and which
_FIXED = ("constant", "request")  # signals whose weights stay the same from token to token
_FEW_SCORES = 64  # up to here numbers are faster than tensors


class Prepared:
    """Members start..stop of a group, which are alike (or one), under one gate.

    Args:
        group: Linear modules on a CPU.
        spec: The gate; see `InForce.decides_each_alone`.
        start: First member.
        stop: After the last.

    Attributes:
        spec: The same.
    """

    def __init__(self, group: PackedMembers, spec: GateSpec, start: int, stop: int) -> None:
        self.spec = spec
        self._group, self._start, self._stop = group, start, stop
        self._count, self._block = stop - start, group.block
        ups, down, _ = group.factors()
        self._ups, self._pieces = ups[start:stop], dict[int, Tensor]()
        self._sizes = [group.units[m + 1] - group.units[m] for m in range(start, stop)]
        self._columns = group.columns_of(start, self._count)
        self._rows = down[group.units[start] : group.units[stop]]
        self._gate: Tensor | None = None
        self._widths: list[int] | None = None
        self._experts = len(group.experts[start])
        self._choose_way(spec)
        taken = [column for m in range(start, stop) for column in group.taken_by(m).tolist()]
        self._taken = self._columns.new_tensor(taken)
        self._taken_by_unit = self._taken[self._columns]
        self._fixed: tuple[Tensor, tuple[_Kept | None, Tensor]] | None = None

    def _choose_way(self, spec: GateSpec) -> None:
        """How one token is decided, and how several are."""
        self._before, self._num_scores = spec.decides_before, 0
        few, all_of_them = spec.top_k, self._sizes[0]
        if spec.granularity != "rank":
            few, all_of_them = (spec.top_k, self._experts) if self._block else (None, 0)
        self._may_skip = few is not None and 2 * few <= all_of_them
        if not spec.is_local:
            self._one = self._several = self._given
            self._rule = spec.rule(0)
            return
        group, rows = self._group, self._group.gate_of(self._start, self._stop)[0].data
        self._num_scores, self._gate = len(rows) // self._count, rows
        self._rule = spec.rule(self._num_scores)
        self._one = self._several = self._by_rank
        if spec.granularity != "rank":
            self._one = self._several = self._by_expert
        if self._may_skip and spec.granularity == "rank":
            self._one = self._kept_ranks
        elif self._may_skip and len(rows) <= _FEW_SCORES:
            self._one = self._kept_experts
        packed = group.packed() if self._count == len(group.names) else None
        if packed is not None:
            self._rows, self._gate = packed, None
            self._widths = [group.units[-1], group.scores[-1]]

    def terms(self, passed: Pass, x: Tensor) -> list[Sequence[Term]]:
        """What is to be added to each member's output."""
        x = x.reshape(-1, x.shape[-1])
        both = functional.linear(x, self._rows)
        if self._widths is None:
            return self.of_products(passed, x, both, None)
        u, scores = both.split_with_sizes(self._widths, dim=1)
        return self.of_products(passed, x, u, scores)

    def of_products(
        self, passed: Pass, x: Tensor, u: Tensor, scores: Tensor | None
    ) -> list[Sequence[Term]]:
        """The same, where the products with the input are there already.

        Args:
            passed: The pass.
            x: Tokens, shape (T, d_in).
            u: Units of all members, shape (T, R).
            scores: Products with the gate's rows, shape (T, n); None if they are not there.
        """
        rows = self._gate
        if scores is None and rows is not None:
            scores = functional.linear(x if x.dtype is rows.dtype else x.to(rows.dtype), rows)
        if scores is not None and self.spec.standardise:
            scores = scores * inverse_deviation(x)[:, None]
        return (self._one if len(u) == 1 else self._several)(passed, u, scores)

    def _by_expert(self, passed: Pass, u: Tensor, scores: Any) -> list[Sequence[Term]]:
        weights = self._weigh(scores)
        if self._may_skip and len(u) == 1:
            return self._kept(u, _nonzero(weights[0].tolist()))
        return self._all(gate_units(u, weights.flatten(1), self._block, self._columns))

    def _by_rank(self, passed: Pass, u: Tensor, scores: Any) -> list[Sequence[Term]]:
        return self._all(gate_units(u, self._weigh(scores).flatten(1), None, None))

    def _weigh(self, scores: Tensor) -> Tensor:
        """Weights (T, M, E), or of ranks."""
        scores = scores.view(len(scores), self._count, -1)
        return gated_stack.weights_of(scores, self._rule, self._bias())

    def _bias(self) -> Tensor | None:
        return self._group.gate_bias(self._start, self._stop)

    def _kept_ranks(self, passed: Pass, u: Tensor, scores: Any) -> list[Sequence[Term]]:
        """The few ranks that a lone token keeps, gathered from where they stand."""
        scores = scores.view(self._count, -1)
        weights, places = kept_of(scores, self._rule, self._bias())
        if self._rule.factor != 1.0:
            weights = weights * self._rule.factor
        kept = (u.view(self._count, -1).gather(1, places) * weights.to(u.dtype)).unsqueeze(1)
        each = zip(kept.unbind(), places.unbind(), self._ups, strict=True)
        return [((units, up.index_select(0, place), 1.0),) for units, place, up in each]

    def _kept_experts(self, passed: Pass, u: Tensor, scores: Any) -> list[Sequence[Term]]:
        """The few experts that a lone token keeps."""
        values, step = scores.tolist()[0], self._num_scores
        ends = range(step, len(values) + 1, step)
        return self._kept(u, [kept_of_one(values[end - step : end], self._rule) for end in ends])

    def _given(self, passed: Pass, u: Tensor, scores: Any) -> list[Sequence[Term]]:
        """With one row of weights, which somebody outside has decided."""
        given = passed.weights if self._before else passed.gate.weights
        assert given is not None
        fixed = self._fixed
        if fixed is None or fixed[0] is not given:
            fixed = self._fixed = given, self._weights_of(given)
        kept, units = fixed[1]
        return self._kept(u, kept) if kept and len(u) == 1 else self._all(u * units)

    def _weights_of(self, given: Tensor) -> tuple[_Kept | None, Tensor]:
        """The experts that have a weight, if they are few; and the weight of every unit (1, R)."""
        kept = None
        if self._block and (self._may_skip or self.spec.signal in _FIXED):
            table = given.index_select(1, self._taken).view(self._count, -1).tolist()
            kept = _nonzero(table)
            kept = kept if 2 * sum(map(len, kept)) <= len(self._taken) else None
        return kept, given.index_select(1, self._taken_by_unit).to(self._rows.dtype)

    def _kept(self, u: Tensor, kept: _Kept) -> list[Sequence[Term]]:
        """The experts that a lone token gives a weight, one by one, and no others."""
        block, known, first = self._block or 0, self._pieces, 0
        found: list[Sequence[Term]] = []
        for up, pairs in zip(self._ups, kept, strict=True):
            terms = []
            for expert, weight in pairs:
                place = first + expert
                piece = known.get(place)
                if piece is None:
                    piece = known[place] = up.narrow(0, expert * block, block)
                terms.append((u.narrow(1, place * block, block), piece, weight))
            found.append(terms)
            first += self._experts
        return found

    def _all(self, z: Tensor) -> list[Sequence[Term]]:
        """Gated units of all experts."""
        parts = (z,) if self._count == 1 else z.split_with_sizes(self._sizes, dim=1)
        return [((part, up, 1.0),) for part, up in zip(parts, self._ups, strict=True)]


def _nonzero(table: Sequence[Sequence[float]]) -> _Kept:
    return [[(expert, weight) for expert, weight in enumerate(row) if weight] for row in table]
