"""A group's units from a kernel, where the dispatch table has one that is faster."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lora_merge.kernels.gated_stack import dispatch
from lora_merge.kernels.gated_stack.base_matrix import FEW_TOKENS, Joined
from lora_merge.kernels.gated_stack.gpu import fused
from lora_merge.kernels.gated_stack.gpu.base_matrix_launch import JoinedStack
from lora_merge.kernels.gated_stack.layout import Layout, Shrunk
from lora_merge.kernels.gated_stack.operation import chosen, gated_shrink, routed_shrink
from lora_merge.mixture.gates.gate import GateSpec
from lora_merge.mixture.runtime.call.in_force import InForce
from lora_merge.mixture.runtime.call.modules import Modules
from lora_merge.mixture.runtime.call.passes import Pass


@dataclass(frozen=True, eq=False)
class Plan:
    """What runs a group, and while what is so; to think of it anew costs as much as a launch.

    Attributes:
        spec: The gate in force.
        seen: Whether somebody looks at the weights, or wants some of them alone.
        wanted: What the user asked for.
        how: The implementation.
        layout: Units and weights; None if none of the kernels knows such modules and gates.
        given: Whether weights are made outside the kernel.
        stack: What runs a joined group.
    """

    spec: GateSpec
    seen: bool
    wanted: str
    how: str = "eager"
    layout: Layout | None = None
    given: bool = False
    stack: JoinedStack | None = None

    def holds(self, gate: InForce) -> bool:
        """Whether all that is still so."""
        return (
            self.spec is gate.spec
            and self.seen == _is_seen(gate)
            and self.wanted == dispatch.forced()
        )


def kernel_units(
    group: Modules, passed: Pass, x: Tensor, start: int, stop: int
) -> Sequence[Shrunk] | None:
    """Gated units of members start..stop.

    Args:
        group: The modules.
        passed: The pass.
        x: Their input, shape (..., d_in).
        start: First member.
        stop: After the last.

    Returns:
        Of each member; or None where the plain operations are to run: for embeddings and
        convolutions, for members that are not alike, for gates that need the units themselves, and
        wherever nothing else is faster or asked for.
    """
    if not group.has_kernel and dispatch.forced() != "reference":
        return None
    down = group.down[group.units[start] : group.units[stop]]
    if torch.compiler.is_compiling():
        plan = _plan(group, passed.gate, x, down, start, stop)
    else:
        tokens = x.numel() // max(1, x.shape[-1])
        key = start, stop, (tokens - 1).bit_length(), x.dtype  # one for each row of the table
        found = group.plans.get(key)
        if found is None or not found.holds(passed.gate):
            found = group.plans[key] = _plan(group, passed.gate, x, down, start, stop)
        plan = found
    layout, how = plan.layout, plan.how
    if layout is None or how not in ("triton", "grouped", "reference"):
        return None
    if x.dtype != down.dtype:
        x = x.to(down.dtype)
    if plan.given:
        weights = group.weights_of(passed, x, start, stop)
        return gated_shrink(x, down, weights, layout, implementation=how)
    gate, bias = group.gate_of(start, stop)
    rule = passed.gate.spec.rule(len(gate) // (stop - start))
    return routed_shrink(x, down, gate, layout, rule, bias=bias, implementation=how)


def _plan(group: Modules, gate: InForce, x: Tensor, down: Tensor, start: int, stop: int) -> Plan:
    """How to run members start..stop."""
    plan = Plan(gate.spec, _is_seen(gate), dispatch.forced())
    if not _suits(group, gate.spec) or (stop - start > 1 and not group.uniform):
        return plan
    plans = group.plans.items()  # of other token counts, whose layouts know where units stand
    known = (p.layout for k, p in plans if k[:2] == (start, stop) and p.spec is gate.spec)
    layout, kind = next(known, None) or _layout(group, gate.spec, start, stop), _kind(group, gate)
    how = chosen(x, down, layout, kind, gate.spec.top_k)
    return replace(plan, how=how, layout=layout, given=kind == "given")


def plan_joined(group: Modules, gate: InForce, x: Tensor, joined: Joined) -> Plan:
    """How to run all members on some tokens where the base weights stand beside the experts.

    Args:
        group: The modules.
        gate: In force.
        x: Their input, shape (..., d_in), T tokens.
        joined: Their matrix.
    """
    count, tokens = len(group.names), x.numel() // joined.d_in
    plan = Plan(gate.spec, _is_seen(gate), dispatch.forced())
    if not (group.has_kernel and joined.up is not None and _suits(group, gate.spec)):
        return plan
    layout = _layout(group, gate.spec, 0, count)
    few = tokens <= FEW_TOKENS
    fits = joined.num_units and (not few or fused.holds(tokens, layout.num_weights + 1))
    if not (fits and tokens and (group.uniform or count == 1)):
        return plan
    kind = _kind(group, gate)
    kept = gate.spec.top_k if kind == "top-k" else None
    units, experts = joined.num_units, layout.num_weights
    case = dispatch.case_of(x, layout.outputs, units, x.dtype, kind, experts, kept)
    # What else many tokens may run on, the modules choose one by one.
    others: list[dispatch.Name] = ["concat"] if few else ["eager", "triton", "grouped"]
    if dispatch.choose(case, [*others, "joined"]) != "joined":
        return plan
    plan = replace(plan, how="joined", layout=layout)
    if kind == "given" or not joined.scores:
        return replace(plan, given=True, stack=JoinedStack(joined, layout))
    rows, bias = group.gate_of(0, count)
    rule = gate.spec.rule(len(rows) // count)
    stack = JoinedStack(joined, layout, scores=len(rows), rule=rule, bias=bias)
    return replace(plan, stack=stack)


def _is_seen(gate: InForce) -> bool:
    """Whether somebody looks at the weights, or wants some of them alone."""
    return gate.observe is not None or gate.only is not None


def _suits(group: Modules, spec: GateSpec) -> bool:
    """Whether the kernels know such modules and gates at all."""
    return group.form == "linear" and spec.signal != "spectrum" and group.rank_gates is None


def _kind(group: Modules, gate: InForce) -> dispatch.GateKind:
    """What the dispatch table calls a gate."""
    if not _makes_own_weights(group, gate):
        return "given"
    return "dense" if gate.spec.top_k is None else "top-k"


def _makes_own_weights(group: Modules, gate: InForce) -> bool:
    """Whether a token's weights are a function of its own scores and nobody wants to see them."""
    spec = gate.spec
    apart = spec.standardise or gate.remembers or group.num_general
    return spec.has_rows and not apart and not _is_seen(gate)


def _layout(group: Modules, spec: GateSpec, start: int, stop: int) -> Layout:
    """The units of members that are alike (or one)."""
    columns = group.columns_of(start)
    outputs = sum(up.shape[1] for up in group.factors()[0][start:stop])
    if spec.granularity == "rank":
        units = torch.arange(len(columns), device=columns.device)
        return Layout(units, len(units), 1, stop - start, outputs)
    return Layout(columns, group.widths[start], group.block, stop - start, outputs)
