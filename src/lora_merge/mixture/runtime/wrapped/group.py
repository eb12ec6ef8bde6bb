"""Modules that read the same input, gated together: one shrink and one gate for q, k and v."""

import re
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from lora_merge.kernels.gated_stack.eager import expand, gate_units
from lora_merge.kernels.gated_stack.layout import Shrunk
from lora_merge.kernels.gated_stack.operation import gated_expand
from lora_merge.mixture.gates.gate import GateSpec
from lora_merge.mixture.gates.layer_norm import inverse_deviation
from lora_merge.mixture.gates.weights import strengths
from lora_merge.mixture.runtime.call.in_force import Decision, Switch
from lora_merge.mixture.runtime.call.passes import Pass
from lora_merge.mixture.runtime.call.tokens import Tokens
from lora_merge.mixture.runtime.wrapped.by_kernel import kernel_units
from lora_merge.mixture.runtime.wrapped.decide import decide
from lora_merge.mixture.runtime.wrapped.decided_outside import decided_outside
from lora_merge.mixture.runtime.wrapped.member import Member
from lora_merge.mixture.runtime.wrapped.packed_members import PackedMembers
from lora_merge.mixture.runtime.wrapped.prepared import Prepared, Term
from lora_merge.mixture.runtime.wrapped.shared_input import Siblings

# Modules that get tokens sorted by who wants them.
_ROUTED = re.compile(r"(^|\.)experts\.")


class Group(PackedMembers):
    """Wrapped modules that share an input; usually one, q/k/v or gate/up.

    The arguments are those of `PackedMembers`.
    """

    def __init__(
        self,
        members: Sequence[Member],
        switch: Switch,
        *,
        num_experts: int,
        num_general: int = 0,
        gate_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            members,
            switch,
            num_experts=num_experts,
            num_general=num_general,
            gate_dtype=gate_dtype,
        )
        self.siblings = Siblings(len(members))
        self.is_cross = [m.is_cross for m in members]
        self.is_routed = any(_ROUTED.search(name) for name in self.names)
        self._shrink = members[0].shrink
        self._compute = self.parts  # bound once each, to be told by identity
        self._compute_terms = self.terms
        self._is_plain = self.form == "linear" and set(self.output_scales) == {1.0}
        self.prepared: dict[tuple[int, int], Prepared] = {}
        self._prepared_at: list[int] = []
        # What `settle` finds: a dtype whose tokens need no second thought; whether all of the
        # matrix that holds the base weights as well is where it was, if there is one.
        self.plain_dtype: torch.dtype | None = None
        self.is_joined = False
        self.whole: Callable[[], bool] | None = None

    def add(self, passed: Pass, index: int, x: Tensor, y: Tensor, *, in_place: bool) -> Tensor:
        """Add the experts of member `index` to its output.

        Args:
            passed: The pass.
            index: Which member.
            x: Input of its base module.
            y: Output of its base module.
            in_place: Whether `y` may be overwritten.
        """
        dtype = self.plain_dtype if passed.each_alone and in_place else None
        if x.dtype is dtype and y.dtype is dtype and x.is_cpu and y.is_contiguous():
            flat = y.view(-1, y.shape[-1])
            for units, up, weight in self.siblings.take(passed, index, x, self._compute_terms):
                flat.addmm_(units, up, alpha=weight)
            return y
        if x.device.type != self._rows[0].device.type:
            self.to(x.device)  # the model has been offloaded since, to compute elsewhere
        up = self._ups[index]
        if self._reads_two(passed):
            z = self.parts(passed, x, index, index + 1)[0]
        else:
            z = self.siblings.take(passed, index, x, self._compute)
        if not isinstance(z, Tensor):
            return gated_expand(y, z, up)
        if self.rank_gates is not None:
            z = z * self.rank_gates[self.units[index] : self.units[index + 1]].to(z.dtype)
        if self.output_scales[index] != 1.0:
            z = z * self.output_scales[index]
        if self.form == "conv":
            return expand(y.movedim(1, -1), z, up).movedim(-1, 1)
        return expand(y, z, up, in_place=in_place)

    def settle(self) -> None:
        """Look once, before a call of the model, at what does not change inside of it."""
        down = self._rows[0]
        plain = self._is_plain and down.is_cpu and not self.has_kernel
        plain = plain and self._parameters["rank_gates"] is None
        self.plain_dtype = down.dtype if plain else None
        addresses = [tensor.data_ptr() for tensor in self._held] if plain else []
        if addresses != self._prepared_at:  # what has been prepared holds views of something else
            self.prepared, self._prepared_at = {}, addresses
        self.is_joined = self.whole is not None and self.whole()

    def terms(self, passed: Pass, x: Tensor, start: int, stop: int) -> list[Sequence[Term]]:
        """What is to be added to the outputs of members start..stop, of tokens decided alone."""
        prepared = self.prepared_for(passed, start, stop)
        if prepared is not None:
            return prepared.terms(passed, x)
        zs = self.gated(passed, x, start, stop)
        return [((z, up, 1.0),) for z, up in zip(zs, self._ups[start:stop], strict=True)]

    def prepared_for(self, passed: Pass, start: int, stop: int) -> Prepared | None:
        """What has been prepared for members start..stop under a pass's gate, if it can be."""
        spec = passed.gate.spec
        if not spec.is_local:
            weights = passed.weights if spec.decides_before else passed.gate.weights
            if weights is None or len(weights) != 1 or not weights.is_cpu:
                return None
        found = self.prepared.get((start, stop))
        if found is None or found.spec is not spec:
            if self.num_general or not (self.uniform or stop - start == 1):
                return None
            found = self.prepared[start, stop] = Prepared(self, spec, start, stop)
        return found

    def _reads_two(self, passed: Pass) -> bool:
        """Whether members may read different texts, which the gate must not mix up."""
        return passed.gate.remembers and any(self.is_cross)

    def parts(self, passed: Pass, x: Tensor, start: int, stop: int) -> Sequence[Tensor | Shrunk]:
        """Gated units of members start..stop, from whichever implementation is fastest."""
        return kernel_units(self, passed, x, start, stop) or self.gated(passed, x, start, stop)

    def gated(self, passed: Pass, x: Tensor, start: int, stop: int) -> Sequence[Tensor]:
        """Gated units of members start..stop, each of shape (T, R_m)."""
        down, _ = self._rows
        if x.dtype != down.dtype and x.is_floating_point():
            x = x.to(down.dtype)
        packed = self._fused() if stop - start == len(self.names) else None
        if packed is not None:
            both = self._shrink(x, packed)
            u, scores = both.split_with_sizes([self.units[-1], self.scores[-1]], dim=1)
            return self.gate_parts(passed, x, u, scores, start, stop)
        u = self._shrink(x, down[self.units[start] : self.units[stop]])
        return self.gate_parts(passed, x, u, None, start, stop)

    def gate_parts(
        self, passed: Pass, x: Tensor, u: Tensor, scores: Tensor | None, start: int, stop: int
    ) -> Sequence[Tensor]:
        """Gate the units of members start..stop.

        Args:
            passed: The pass.
            x: Input of the modules.
            u: Units, shape (T, R) of these members.
            scores: Products with the gate's rows, shape (T, n) of these members, if they are there.
            start: First member.
            stop: After the last.

        Returns:
            Gated units of each, shape (T, R_m).
        """
        if scores is None:
            scores = self._products(passed, x, start, stop)
        if stop - start > 1 and not self.uniform:
            bounds = self.scores if scores is not None else [0] * (stop + 1)
            pieces = []
            for m in range(start, stop):
                one = u[:, self.units[m] : self.units[m + 1]]
                part = None if scores is None else scores[:, bounds[m] : bounds[m + 1]]
                pieces.append(self._gate(passed, x, one, part, m, m + 1))
            return pieces
        z = self._gate(passed, x, u, scores, start, stop)
        if stop - start == 1:
            return (z,)
        return [z[:, a:b] for a, b in pairwise(self.units)]

    def _fused(self) -> Tensor | None:
        """The packed matrix, where no gradient is wanted of a part of it."""
        if torch.is_grad_enabled() and any(p is not None and p.requires_grad for p in self._rows):
            return None
        return None if torch.compiler.is_compiling() else self.packed()

    def _products(self, passed: Pass, x: Tensor, start: int, stop: int) -> Tensor | None:
        """Products with the gate's rows, shape (T, n), if its scores are made of them."""
        _, weight = self._rows
        if weight is None or not passed.gate.spec.is_local:
            return None
        rows = weight[self.scores[start] : self.scores[stop]]
        cast = x.is_floating_point() and x.dtype != rows.dtype
        return self._shrink(x.to(rows.dtype) if cast else x, rows)

    def _gate(
        self, passed: Pass, x: Tensor, u: Tensor, raw: Tensor | None, start: int, stop: int
    ) -> Tensor:
        """Gate members start..stop, which are alike (or one)."""
        weights = self._weigh(passed, x, u, raw, start, stop).flatten(1)
        if passed.gate.spec.granularity == "rank":
            return gate_units(u, weights, None, None)
        columns = None if self.block is not None else self.columns_of(start, stop - start)
        return gate_units(u, weights, self.block, columns)

    def weights_of(self, passed: Pass, x: Tensor, start: int, stop: int) -> Tensor:
        """Weights of members start..stop, which are alike (or one), where they need no units.

        Returns:
            Shape (T', M C), T' dividing the number of tokens; C with the general experts.
        """
        raw = self._products(passed, x, start, stop)
        return self._weigh(passed, x, None, raw, start, stop).flatten(1)

    def _weigh(
        self, passed: Pass, x: Tensor, u: Tensor | None, raw: Tensor | None, start: int, stop: int
    ) -> Tensor:
        """Weights of members start..stop, shape (T', M, C)."""
        gate, spec = passed.gate, passed.gate.spec
        routed = passed.routed
        seen = self._seen(passed, x, start) if gate.needs_tokens and routed is None else None
        if spec.is_local:
            scores = self._scores(spec, x, u, raw, start, stop)
            weights, scores = decide(self, passed, seen, x, scores, start, stop)
        else:
            scores = None
            weights = decided_outside(self, passed, seen, x, start, stop)
        if gate.observe is not None:
            counts = _counts(passed, seen)
            by_rank, tokens = spec.granularity == "rank", None if routed is None else routed.tokens
            gate.observe(
                Decision(self, start, stop, weights, scores, counts, by_rank, passed.replay, tokens)
            )
        if self.num_general and spec.granularity != "rank":
            general = self.widths[start] - len(self.experts[start])
            share = -weights.sum(-1, keepdim=True) / self.num_general
            weights = torch.cat([weights, share.expand(*share.shape[:-1], general)], dim=-1)
        return weights

    def scores_of(self, passed: Pass, x: Tensor, start: int, stop: int) -> Tensor:
        """Scores of any tokens, shape (T, M, n)."""
        raw, u = self._products(passed, x, start, stop), None
        if raw is None:
            down = self.down[self.units[start] : self.units[stop]]
            u = self._shrink(x.to(down.dtype), down)
        return self._scores(passed.gate.spec, x, u, raw, start, stop)

    def _scores(
        self, spec: GateSpec, x: Tensor, u: Tensor | None, raw: Tensor | None, start: int, stop: int
    ) -> Tensor:
        """Scores of shape (T, M, n), from products with rows or else from the units."""
        count = stop - start
        if u is None or raw is not None:
            assert raw is not None
            scores = raw.view(raw.shape[0], count, raw.shape[1] // count)
            if spec.signal == "prototype":
                scores = scores.abs()
            elif spec.standardise:
                scores = scores * inverse_deviation(x)[:, None, None]
            return scores
        spectrum: Tensor = self.spectrum  # type: ignore[assignment]
        scaled = u * spectrum[self.units[start] : self.units[stop]]
        columns = None if spec.granularity == "rank" else self.columns_of(start, count)
        scores = strengths(scaled, columns, count * len(self.experts[start]))
        return scores.view(len(u), count, -1)

    # -- tokens ----------------------------------------------------------------------------------

    def _seen(self, passed: Pass, x: Tensor, start: int) -> Tokens | None:
        """The tokens of an input, row by row; None if the pass cannot know."""
        stage = passed.stage
        if stage is None or stage.current is None or self.is_routed:
            return None
        tokens = stage.current
        if self.form == "conv":
            places = x.shape[0] == tokens.rows
            return Tokens(tokens.rows, None) if places else None
        return tokens.read_by(x, ids=self.form == "embedding", cross=self.is_cross[start])


def _counts(passed: Pass, seen: Tokens | None) -> Tensor | None:
    """Which tokens of an input are no padding, bool, shape (T,); None if all, or nobody knows."""
    if passed.routed is None:
        return None if seen is None or seen.counts is None else seen.counts.flatten()
    current = None if passed.stage is None else passed.stage.current
    if current is None or current.counts is None or current.counts.numel() != passed.routed.total:
        return None
    return passed.routed.of_rows(current.counts.flatten())
