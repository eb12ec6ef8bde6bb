"""Decide everything about a merge from headers alone."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from lora_merge.adapters.adapter import Adapter
from lora_merge.adapters.aligned_module import AlignedModule
from lora_merge.adapters.alignment import Alignment, align
from lora_merge.adapters.formats.table import format_of
from lora_merge.adapters.identity.expert_choice import peft_of
from lora_merge.adapters.measured.activations import Statistics
from lora_merge.adapters.measured.fingerprints import fingerprints
from lora_merge.adapters.module_names import count_layers
from lora_merge.adapters.writer import OutputPlan, plan_output
from lora_merge.errors import MethodError
from lora_merge.files.tensor_file import DTYPE_CODES, widest_dtype
from lora_merge.merge.auto.method import choose
from lora_merge.merge.extras import plan_extras
from lora_merge.merge.methods.registry import Method, find_method
from lora_merge.merge.module_work import module_bytes, work_notes
from lora_merge.merge.per_adapter import check_own, own_values, split_parameters
from lora_merge.merge.planned_ranks import plan_ranks
from lora_merge.merge.recipe.by_module import ByModule, refuse_unmatched_filters
from lora_merge.merge.recipe.recipe import AdapterItem, Recipe, RecipeError, Semantics, Space
from lora_merge.options import parse_options
from lora_merge.ranks.rule import RankRule

if TYPE_CHECKING:
    from lora_merge.merge.waiting_results import Spool

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class MergePlan:
    """A merge, ready to run.

    Attributes:
        recipe: What was asked for, one item per adapter.
        given: The adapters in the recipe's order; those of weight 0 too.
        alignment: Adapters (canonical order) and modules; adapters whose weight in a module is 0
            are not in it.
        weights: Weight of each adapter, by index.
        own: Parameters that each adapter has for itself, by index.
        method: The method.
        options: Its parsed parameters.
        rule: How ranks are chosen.
        ranks: Rank of each module's result; the largest possible one until `rule` was applied.
        extras: Tensor that is not a factor → the adapters whose tensors are averaged for it.
        output: What is written.
        notes: What the user should know before the work starts.
        semantics: Weights, scale, norms and steps that all methods share.
        statistics: Collected activations, for methods that need them.
        scale_reason: Why the scale is what it is, where nobody gave it.
        spool: Results that wait on disk: for their ranks, or for those of other shards.
        shared: What the method found out about all modules together, where that is known.
    """

    recipe: Recipe
    given: tuple[Adapter, ...]
    alignment: Alignment
    weights: tuple[ByModule, ...]
    own: tuple[Mapping[str, ByModule], ...]
    method: Method
    options: Any
    rule: RankRule
    ranks: Mapping[str, int]
    extras: Mapping[str, tuple[Adapter, ...]]
    output: OutputPlan
    notes: tuple[str, ...]
    semantics: Semantics
    spool: "Spool | None" = None
    shared: Any = None
    statistics: Statistics | None = None
    scale_reason: str = ""

    @property
    def measured(self) -> bool:
        """Whether ranks depend on the results, so that a first pass must find them."""
        return self.rule.kind not in ("fixed", "full")

    @property
    def units_survive(self) -> bool:
        """Whether the units that the method makes are those that are written, in its order."""
        return self.rule.kind == "fixed" and not self.semantics.svc

    @cached_property
    def num_layers(self) -> int:
        """Layers of the model, as far as the adapters tell."""
        return count_layers([m.name for m in self.alignment.modules])

    def weights_at(self, module: str) -> list[float]:
        """Weight of each adapter in a module."""
        return [w.at(module, self.num_layers) or 0.0 for w in self.weights]

    def own_at(self, module: str) -> tuple[dict[str, float], ...]:
        """Parameters that each adapter has for itself in a module; empty if none has any."""
        if not any(self.own):
            return ()
        return tuple(own_values(own, module, self.num_layers) for own in self.own)

    @property
    def by_name(self) -> list[int]:
        """Indices of the adapters in the order to show them in: as given, where that matters."""
        indices = range(len(self.alignment.adapters))
        if self.method.ordered:
            return list(indices)
        return sorted(
            indices, key=lambda i: (self.alignment.adapters[i].name, str(self.weights[i].to_data()))
        )

    def resolved_recipe(self) -> Recipe:
        """The recipe with sources pinned, all parameters written out, without weights of 0.

        Adapters stand in the order of their names, unless that of the recipe has a meaning. Hashes
        the inputs, each once.
        """
        if self.recipe.extras == "first":
            pairs = zip(self.given, self.recipe.adapters, strict=True)
            items = [
                _item(adapter, item.weight, item.parameters)
                for adapter, item in pairs
                if ByModule.of(item.weight).constant != 0
            ]
        else:
            items = [
                _item(
                    self.alignment.adapters[i],
                    self.weights[i].to_data(),
                    {name: value.to_data() for name, value in self.own[i].items()},
                )
                for i in self.by_name
            ]
        bases = {a.config.base_model for a in self.alignment.adapters} - {None}
        return replace(
            self.recipe,
            merge_method=self.method.name,
            adapters=tuple(items),
            rank=self._rank_value(),
            parameters={n: v for n, v in asdict(self.options).items() if v is not None},
            scale=self.semantics.scale,
            accept_base_models=len(bases) > 1,
        )

    def _rank_value(self) -> int | str | None:
        if self.rule.kind == "fixed":
            return int(self.rule.value or 0)
        return None if self.rule.kind == "units" else str(self.rule)

    def with_ranks(self, ranks: Mapping[str, int], spool: "Spool") -> "MergePlan":
        """The plan once the ranks are known."""
        output = plan_output(
            self.alignment.adapters,
            self.alignment.modules,
            ranks,
            dtype=self.output.dtype,
            layout=self.recipe.ranks,
            extras=self.output.extras,
            base_model=self.alignment.base_model,
            file_format=self.output.file_format,
            peft_version=peft_of(self.recipe.experts),
        )
        return replace(self, ranks=ranks, output=output, spool=spool)

    def peak_bytes(self, jobs: int) -> int:
        """Estimated working memory in bytes.

        Per worker: the largest module as stored and as float32 stack, its Grams and its result,
        and the merged delta where that is formed.
        """
        return jobs * max(module_bytes(self, module) for module in self.alignment.modules)


def plan_merge(recipe: Recipe, adapters: Sequence[Adapter]) -> MergePlan:
    """Check adapters and parameters and plan the merge. Reads headers and a few small tensors.

    Args:
        recipe: What is wanted. A module with fewer units than its rank keeps them all; an adapter
            of weight 0 counts as absent; the method "auto" reads a few modules to choose one.
        adapters: Its adapters, opened, one per item. The result does not depend on their order.

    Raises:
        AlignmentError: If the adapters do not fit together.
        MethodError: If the method cannot do what is asked.
        RecipeError: If the recipe names another base model than the adapters do.
    """
    given = _weights(recipe, adapters)
    # An adapter of weight 0 must fit, too.
    everything = align(adapters, accept_base_models=recipe.accept_base_models)
    adapters = everything.adapters
    _check_base(recipe, adapters)
    present = [i for i, w in enumerate(given) if w.constant != 0]
    if not present:
        raise MethodError("all weights are 0", "give at least one adapter a weight")
    method, reason = recipe.merge_method, None
    if method == "auto":
        choice = choose(everything.of(present))
        method, reason = choice.method, f"auto chose {choice.method}: {choice.reason}"
    chosen = find_method(method)
    of_all, own = split_parameters(
        chosen, recipe.parameters, [item.parameters for item in recipe.adapters], adapters
    )
    names = [module.name for module in everything.modules]
    for adapter, weight, values in zip(adapters, given, own, strict=True):
        refuse_unmatched_filters([weight, *values.values()], names, adapter.name)
    options = chosen.parse(of_all)
    semantics = _semantics(recipe)
    space = _space(chosen, semantics)
    _check_count(chosen, len(present))
    if chosen.needs and semantics.smooth != "none":
        raise MethodError(
            f"method {chosen.name} needs statistics of the adapters as they are, and smooth "
            "changes them",
            "leave out --smooth",
        )
    as_given = [adapters[i] for i in present]
    if not chosen.ordered:
        present = _by_content(present, adapters, given, own)
    weights = tuple(given[i] for i in present)
    alignment = _weighted_alignment(everything.of(present), weights)
    present_own = tuple(own[i] for i in present)
    check_own(chosen, of_all, present_own, alignment)
    rule, ranks, notes = plan_ranks(alignment, chosen, recipe.rank, space)
    kept, extra_notes = plan_extras(
        as_given if recipe.extras == "first" else alignment.adapters, recipe.extras
    )
    output = plan_output(
        alignment.adapters,
        alignment.modules,
        ranks,
        dtype=_output_dtype(alignment, recipe.dtype),
        layout=recipe.ranks,
        extras={n: (a[0].extras[n].dtype, a[0].extras[n].shape) for n, a in kept.items()},
        base_model=alignment.base_model,
        file_format=format_of(alignment.adapters),
        peft_version=peft_of(recipe.experts),
    )
    notes = [
        *([reason] if reason else []),
        *notes,
        *_base_notes(alignment),
        *extra_notes,
        *sorted(f"{a.name}: {n}" for a in alignment.adapters for n in a.notes),
    ]
    _LOG.info("%s of %d adapters on %d modules", chosen.name, len(adapters), len(ranks))
    plan = MergePlan(
        recipe=recipe,
        given=tuple(adapters),
        alignment=alignment,
        weights=weights,
        own=present_own,
        method=chosen,
        options=options,
        rule=rule,
        ranks=ranks,
        extras=kept,
        output=output,
        notes=tuple(notes),
        semantics=semantics,
        statistics=_statistics(chosen, recipe.statistics),
    )
    return replace(plan, notes=(*plan.notes, *work_notes(plan)))


def _weights(recipe: Recipe, adapters: Sequence[Adapter]) -> tuple[ByModule, ...]:
    if len(recipe.adapters) != len(adapters):
        raise MethodError(
            f"{len(recipe.adapters)} weights for {len(adapters)} adapters",
            "give one -w per adapter, in their order",
        )
    return tuple(ByModule.of(item.weight) for item in recipe.adapters)


def _check_base(recipe: Recipe, adapters: Sequence[Adapter]) -> None:
    bases = {a.config.base_model for a in adapters} - {None}
    if recipe.base_model and bases and recipe.base_model not in bases:
        names = ", ".join(sorted(map(str, bases)))
        raise RecipeError(
            f"base_model is {recipe.base_model!r}, the adapters' is {names}",
            "correct base_model, or leave it out",
        )


def _semantics(recipe: Recipe) -> Semantics:
    given = {spec.name: getattr(recipe, spec.name) for spec in fields(Semantics)}
    return parse_options(Semantics, given, "a merge")


def _by_content(
    present: Sequence[int],
    adapters: Sequence[Adapter],
    weights: Sequence[ByModule],
    own: Sequence[Mapping[str, ByModule]],
) -> list[int]:
    """Indices in the one order that neither arguments nor names decide, so that results do not."""
    found = fingerprints([adapters[i] for i in present])
    prints = dict(zip(present, found, strict=True))

    def key(index: int) -> tuple[str, ...]:
        parameters = sorted((name, str(value.to_data())) for name, value in own[index].items())
        weight, config = str(weights[index].to_data()), repr(adapters[index].config)
        return prints[index], weight, str(parameters), config, adapters[index].name

    return sorted(present, key=key)


def _statistics(method: Method, path: str | None) -> Statistics | None:
    if method.needs and path is None:
        raise MethodError(
            f"method {method.name} needs {method.needs}",
            "collect them with lora_merge.collect_statistics and give the file: --statistics FILE",
        )
    return None if path is None else Statistics.open(path)


def _space(method: Method, semantics: Semantics) -> Space:
    """Where the method works."""
    spaces = method.spaces or (method.space,)
    if semantics.space is not None and semantics.space not in spaces:
        raise MethodError(
            f"method {method.name} does not work in space {semantics.space!r}",
            f"choose from: {', '.join(spaces)}",
        )
    return semantics.space or method.space


def _check_count(method: Method, count: int) -> None:
    low, high = method.adapters
    if count < low or (high is not None and count > high):
        wanted = f"{low}" if low == high else f"{low} to {high}" if high else f"at least {low}"
        raise MethodError(
            f"method {method.name} merges {wanted} adapters, not {count}",
            "choose another method: `lora-merge methods`",
        )


def _weighted_alignment(alignment: Alignment, weights: Sequence[ByModule]) -> Alignment:
    """The alignment without those adapters of each module whose weight there is 0."""
    if all(w.constant is not None for w in weights):
        return alignment
    layers = count_layers([m.name for m in alignment.modules])
    modules = []
    for module in alignment.modules:
        specs = {i: s for i, s in module.specs.items() if weights[i].at(module.name, layers)}
        if specs:
            modules.append(AlignedModule(module.name, specs))
    if not modules:
        raise MethodError("all weights are 0", "give at least one adapter a weight somewhere")
    return Alignment(alignment.adapters, tuple(modules), alignment.base_model)


def _base_notes(alignment: Alignment) -> list[str]:
    bases = sorted({a.config.base_model for a in alignment.adapters if a.config.base_model})
    return [f"base models differ: {', '.join(bases)}"] if len(bases) > 1 else []


def _output_dtype(alignment: Alignment, dtype: str | None) -> str:
    if dtype is None:
        return widest_dtype(s.dtype for m in alignment.modules for s in m.specs.values())
    chosen = getattr(torch, dtype, None)
    if chosen not in DTYPE_CODES:
        names = ", ".join(str(t).removeprefix("torch.") for t in DTYPE_CODES)
        raise MethodError(f"{dtype!r} is no dtype for factors", f"choose from: {names}")
    return DTYPE_CODES[chosen]


def _item(adapter: Adapter, weight: Any, parameters: Mapping[str, Any]) -> AdapterItem:
    source = adapter.source
    bare = source is not None and source.config_text is None
    return AdapterItem(
        adapter=adapter.name,
        weight=weight,
        revision=source.revision if source else None,
        sha256=source.digest if source else None,
        alpha=adapter.config.lora_alpha if bare else None,
        rslora=adapter.config.use_rslora if bare else False,
        parameters=dict(parameters),
    )
