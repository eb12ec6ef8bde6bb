"""Base weights and experts of a group in one matrix: an option for plain linear layers.

The weights stay parameters of their modules, with the same values, as views of the matrix; taking
the experts off copies them back to memory of their own.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from lora_merge.errors import MethodError
from lora_merge.kernels.gated_stack import base_matrix, dispatch
from lora_merge.kernels.gated_stack.base_matrix import Joined
from lora_merge.kernels.gated_stack.eager import expand
from lora_merge.kernels.gated_stack.gpu.base_matrix_launch import gate_pieces, has_pieces
from lora_merge.mixture.runtime.call.passes import Pass, current, of_module
from lora_merge.mixture.runtime.wrapped.by_kernel import Plan, plan_joined
from lora_merge.mixture.runtime.wrapped.group import Group
from lora_merge.mixture.runtime.wrapped.shared_input import Siblings


class JoinedGroup:
    """A group whose modules run as one product, whenever no gradient is wanted.

    Args:
        group: Linear modules with one input.
        linears: The modules, in the group's order.
        border: Whether many tokens run as one product as well.
    """

    def __init__(self, group: Group, linears: Sequence[nn.Linear], *, border: bool) -> None:
        self.group = group
        self.linears, self.border = list(linears), border
        self.siblings = Siblings(len(linears))
        # Looking up a module's attributes costs as much as a small kernel.
        self._shapes = [(linear._parameters, linear.out_features) for linear in linears]
        # Bound once, to be told by identity.
        self._ways, self._one_token = (self._mixed, self._base), self._quick
        self._at_base = Pass(group.switch, group.switch.default)
        self.join()
        group.whole = self.is_whole
        for index, linear in enumerate(self.linears):
            linear.forward = partial(self.run, index)  # type: ignore[method-assign]

    def join(self) -> None:
        """Move weights and experts into a matrix of their own."""
        weights = [linear.weight.data for linear in self.linears]
        ups, down, gate = self.group.factors()
        self._pieces = self._gate_apart(gate)
        if self._pieces is not None:
            gate = gate_pieces(self._pieces.data, down.dtype)
            self._version = self._pieces._version
        self.joined: Joined = base_matrix.join(weights, ups, down, gate, border=self.border)
        for linear, view in zip(self.linears, self.joined.weights, strict=True):
            linear.weight.data = view
        self.group.adopt(self.joined)
        self._weights = self.joined.rows[: self.joined.outputs[-1]]
        used = sum(self.joined.splits)
        self._splits = [*self.joined.splits, len(self.joined.padded) - used]
        self._plans: dict[int, Plan] = {}
        held: list[tuple[nn.Module, str]] = [(linear, "weight") for linear in self.linears]
        held += [(self.group, name) for name in self.group._parameters]
        self._places = [
            (module, name, parameter, parameter.data_ptr())
            for module, name in held
            if (parameter := module._parameters[name]) is not None
        ]

    def _gate_apart(self, gate: Tensor | None) -> Tensor | None:
        """The float32 gate of bfloat16 modules, where a kernel could use it in three pieces."""
        weight, few = self.group.weight, not self.border
        if gate is not None or weight is None or not (few and self.group.has_kernel):
            return None
        exact = has_pieces(weight, self.group.down.dtype) and not weight.is_inference()
        return weight if exact else None

    def part(self) -> None:
        """Give the modules their own forward and memory back."""
        for linear in self.linears:
            linear.__dict__.pop("forward", None)
            linear.weight.data = linear.weight.data.clone(memory_format=torch.contiguous_format)

    def is_whole(self) -> bool:
        """Whether the matrix is what the modules hold; not after a copy, a move, another weight."""
        for module, name, parameter, address in self._places:
            if module._parameters[name] is not parameter or parameter.data_ptr() != address:
                return False
        pieces = self._pieces
        if pieces is not None and pieces._version != self._version:  # the gate was trained
            self.joined.gate.copy_(gate_pieces(pieces.data, self.joined.matrix.dtype))
            self._version = pieces._version
        return True

    def run(self, index: int, input: Tensor) -> Tensor:
        """Forward of module `index`."""
        group = self.group
        passed = current(group.switch)
        if (
            passed is not None
            and passed.each_alone
            and not passed.bypass
            and group.is_joined
            and input.numel() == self.joined.d_in
            and input.dtype is group.plain_dtype
            and input.is_cpu
            and not (torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"))
        ):
            return self.siblings.take(passed, index, input, self._one_token)
        mixed = passed if passed is not None and not passed.bypass else None
        if passed is None:
            mixed = of_module(group.switch)
        if self._may_join(input) and self._pays(mixed, input):
            way = self._ways[mixed is None]
            return self.siblings.take(mixed or passed or self._at_base, index, input, way)
        linear = self.linears[index]
        y = functional.linear(input, linear.weight, linear.bias)
        if mixed is None:
            return y
        return group.add(mixed, index, input, y, in_place=not torch.is_grad_enabled())

    def _quick(self, passed: Pass, x: Tensor, start: int, stop: int) -> Sequence[Tensor]:
        """Outputs of modules start..stop for one token on a CPU, which is decided alone."""
        prepared = self.group.prepared_for(passed, start, stop)
        if prepared is None or stop - start != len(self.linears):
            return self._mixed(passed, x, start, stop)
        tokens = x.reshape(1, -1)
        *ys, u, scores, _ = functional.linear(tokens, self.joined.padded).split_with_sizes(
            self._splits, dim=1
        )
        terms = prepared.of_products(passed, tokens, u, self._given(scores))
        shape = x.shape[:-1]
        for place, (parts, (parameters, width)) in enumerate(zip(terms, self._shapes, strict=True)):
            y = ys[place]
            for units, up, weight in parts:
                y.addmm_(units, up, alpha=weight)
            bias = parameters["bias"]
            ys[place] = (y if bias is None else y.add_(bias)).view(*shape, width)
        return ys

    def _may_join(self, x: Tensor) -> bool:
        """Whether one product may stand for many: no gradient, graph, other dtype or rank gates."""
        return not (
            torch.is_grad_enabled()
            or x.dtype != self.joined.matrix.dtype
            or torch.compiler.is_compiling()
            or torch.is_autocast_enabled(x.device.type)
            or self.group.rank_gates is not None
        )

    def _pays(self, passed: Pass | None, x: Tensor) -> bool:
        """Whether it is worth it: for few tokens, with a border, or where a kernel is to run."""
        if self.border or x.numel() <= base_matrix.FEW_TOKENS * x.shape[-1]:
            return True
        return passed is not None and self._plan(passed, x).stack is not None

    def _mixed(self, passed: Pass, x: Tensor, start: int, stop: int) -> list[Tensor]:
        """Outputs of modules start..stop."""
        outs, whole = None, self.group.is_joined if passed.each_alone else self.is_whole()
        if stop - start == len(self.linears) and whole:  # neither apart nor moved
            outs = self._by_kernel(passed, x) or self._joined(passed, x)
        if outs is None:
            ys, zs = self._plain(x, start, stop), self.group.gated(passed, x, start, stop)
            ups = self.group.factors()[0][start:stop]
            outs = [expand(y, z, up) for y, z, up in zip(ys, zs, ups, strict=True)]
        return self._finish(outs, x, start)

    def _base(self, passed: Pass, x: Tensor, start: int, stop: int) -> list[Tensor]:
        """The same without the experts."""
        tokens, joined = x.reshape(-1, x.shape[-1]), self.joined
        many = len(tokens) > base_matrix.FEW_TOKENS
        if many or stop - start != len(self.linears) or not self.is_whole():
            return self._finish(self._plain(x, start, stop), x, start)
        both = functional.linear(tokens, self._weights)
        ys = both.split_with_sizes(joined.splits[:-2], dim=1)
        return self._finish([y.contiguous() for y in ys], x, start)

    def _by_kernel(self, passed: Pass, x: Tensor) -> list[Tensor] | None:
        """Outputs of all modules from a kernel, if one is to run."""
        plan = self._plan(passed, x)
        if plan.stack is None:
            return None
        stack, tokens = plan.stack, x.reshape(-1, x.shape[-1])
        weights = self.group.weights_of(passed, x, 0, len(self.linears)) if plan.given else None
        return dispatch.guarded("joined", lambda: stack(tokens, weights), lambda: None)

    def _plan(self, passed: Pass, x: Tensor) -> Plan:
        """What runs all modules; of many tokens one for each row of the table."""
        tokens = x.numel() // max(1, self.joined.d_in)
        few = tokens <= base_matrix.FEW_TOKENS
        key = tokens if few else -(tokens - 1).bit_length()
        plan = self._plans.get(key)
        if plan is None or not plan.holds(passed.gate):
            plan = self._plans[key] = plan_joined(self.group, passed.gate, x, self.joined)
        return plan

    def _joined(self, passed: Pass, x: Tensor) -> list[Tensor] | None:
        """Outputs of all modules from the products of the joined matrix, if it has the border."""
        tokens, joined = x.reshape(-1, x.shape[-1]), self.joined
        if len(tokens) > base_matrix.FEW_TOKENS:
            if not self.border:
                return None
            u, scores = base_matrix.shrink_alone(tokens, joined)
            return base_matrix.expand_with_base(tokens, self._gated(passed, x, u, scores), joined)
        ys, u, scores = base_matrix.shrink_with_base(tokens, joined)
        return base_matrix.expand_after(ys, self._gated(passed, x, u, scores), joined)

    def _finish(self, outs: Sequence[Tensor], x: Tensor, start: int) -> list[Tensor]:
        """Outputs with their biases, in the shape of the input."""
        shape, finished = x.shape[:-1], []
        for (parameters, width), out in zip(self._shapes[start:], outs, strict=False):
            y, bias = out.view(*shape, width), parameters["bias"]
            finished.append(y if bias is None else y + bias)
        return finished

    def _plain(self, x: Tensor, start: int, stop: int) -> list[Tensor]:
        """One product for each base module."""
        return [functional.linear(x, linear.weight) for linear in self.linears[start:stop]]

    def _gated(self, passed: Pass, x: Tensor, u: Tensor, scores: Tensor) -> Sequence[Tensor]:
        """Gated units of all members."""
        return self.group.gate_parts(passed, x, u, self._given(scores), 0, len(self.linears))

    def _given(self, scores: Tensor) -> Tensor | None:
        """Scores from the matrix; without rows in it the gate makes its own."""
        return scores if self.joined.scores and self._pieces is None else None


def join_groups(
    model: nn.Module, groups: Iterable[Group], targets: Mapping[str, nn.Module], *, border: bool
) -> list[JoinedGroup]:
    """Join every group of linear modules; embeddings and convolutions stay apart.

    Args:
        model: The model.
        groups: The wrapped modules.
        targets: The model's modules by the experts' names for them.
        border: Whether many tokens run as one product as well.

    Raises:
        MethodError: Naming the first module whose weight is not its own plain float matrix. Nothing
            has been moved then.
    """
    linear = [group for group in groups if group.form == "linear"]
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(parameter.data_ptr(), []).append(name)
    found = []
    for group in linear:
        modules = []
        for name in group.names:
            module = targets[name]
            reason = _refusal(module, group.down.dtype, owners)
            if reason or not isinstance(module, nn.Linear):
                raise MethodError(f"cannot join: {name} {reason}", "leave layout at 'stack'")
            modules.append(module)
        found.append((group, modules))
    return [JoinedGroup(group, modules, border=border) for group, modules in found]


def _refusal(module: nn.Module, dtype: torch.dtype, owners: Mapping[int, list[str]]) -> str:
    """Why a module cannot be joined; empty if it can."""
    if type(module) is not nn.Linear:
        return f"is a {type(module).__name__}, not a plain nn.Linear"
    weight = module.weight
    if weight.dtype != dtype or weight.device.type == "meta":
        return f"is {weight.dtype} on {weight.device.type}, its experts {dtype}"
    if "forward" in module.__dict__:
        return "runs through a forward that something else put there"
    names = owners.get(weight.data_ptr(), [])
    return "" if len(names) == 1 else f"shares its weight: {', '.join(names) or 'a wrapper'}"
