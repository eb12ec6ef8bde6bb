"""What a merge method is: a combiner, the space it sees, and what the table says of it."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from lora_merge.adapters.rank_stack import RankStack
from lora_merge.errors import MethodError
from lora_merge.merge.recipe.recipe import Normalize, Space
from lora_merge.options import NoOptions, Parameter, describe_options, parse_options


@dataclass(frozen=True, eq=False)
class Job:
    """What a combiner is told besides the stack.

    Attributes:
        module: Name of the module (with the expert's index, where there are several).
        rank: Rank that is asked for; None where every direction is wanted.
        weights: Weight of each adapter, normalised, float64, shape (N,), indexed by owner.
        seed: The merge's seed.
        space: The space the stack is in.
        own: Parameters that an adapter has for itself in this module, by owner; empty where all
            adapters have the method's.
        source: The stack as it was read, before any step or change of coordinates.
        shared: What `Method.prepare` found out about all modules together.
        statistics: Collected activations of this module by name; empty where none were given.
        exact: Decompose whole matrices, also where the leading directions would do.
    """

    module: str
    rank: int | None
    weights: Tensor
    seed: int
    space: Space = "units"
    own: tuple[Mapping[str, float], ...] = ()
    source: RankStack | None = None
    shared: Any = None
    statistics: Mapping[str, Tensor] = field(default_factory=dict)
    exact: bool = False

    def rng(self) -> np.random.Generator:
        """Random numbers of this module: the same whatever else is merged, and in what order."""
        digest = hashlib.blake2b(f"{self.seed}:{self.module}".encode(), digest_size=8).digest()
        return np.random.default_rng(int.from_bytes(digest, "little"))


@dataclass(frozen=True, eq=False)
class Outcome:
    """What a combiner makes of one stack.

    Attributes:
        stack: The merged units, in the coordinates that the combiner was given.
        details: What the report should say of this module, as JSON values.
        energy: Share of its energy that the combiner kept where it made the rank itself.
        mixes: Where the merged units are combinations of the stack's: their coefficients for
            `down` and for `up`, float64, each (k, R). The report then needs no further pass over
            the vectors.
    """

    stack: RankStack
    details: Mapping[str, Any] = field(default_factory=dict)
    energy: float = 1.0
    mixes: tuple[Tensor, Tensor] | None = None


# Calls its argument with every module's stack and job, in any order and from several threads.
Survey = Callable[[Callable[[RankStack, "Job"], None]], None]
Combiner = Callable[[RankStack, Job, Any], Outcome]


@dataclass(frozen=True)
class Method:
    """A merge method: one row of the table.

    Attributes:
        name: Its name in recipes and on the command line.
        summary: What it does, in a line.
        paper: Where it is from.
        combine: (stack, job, options) → outcome. Adapters that are absent are not in the stack.
        options: Frozen dataclass of its parameters, made with `option`.
        ignores: Fields of `options` that it does not look at, and refuses.
        presets: Defaults that differ from those of `options`.
        shown: Defaults to show in help texts where the options themselves say None.
        space: The space it works in unless the user says otherwise.
        spaces: The spaces it can work in.
        rank: Rank rule unless the user gives one: "largest" is that of the largest input rank.
        check: Refuses options that do not go together, by raising MethodError.
        per_adapter: Parameters that an adapter may have for itself, and that may differ by module.
        prepare: (survey, options) → what the combiner finds in `job.shared`; a survey goes through
            all modules, as often as it is called.
        makes_rank: The combiner itself makes the rank asked for; otherwise its result is truncated.
        full_rank_in: Spaces where results have the rank of a matrix, not of the units that went in.
        normalize: What is done to the weights unless the user says otherwise.
        anchored: In core coordinates, the result depends on which bases are chosen.
        exact: A law says what comes out, so that `scale: auto` leaves it alone.
        separates: It keeps adapters out of each other's way, so that more of it can be applied.
        gauge_free: The result depends on the deltas alone, not on how they are factored.
        adapters: Smallest and largest number of adapters.
        ordered: The order of the adapters means something.
        grams: It looks at the inner products of all units.
        sums: The result is the weighted sum of the deltas and nothing else.
        searches: It makes the rank by the cut of a matrix, of which the leading directions do.
        needs: What it needs besides the adapters, in words; "" for nothing.
        cost: Work per module, in words.
        aliases: Other names.
    """

    name: str
    summary: str
    paper: str
    combine: Combiner
    options: type[Any] = NoOptions
    ignores: tuple[str, ...] = ()
    presets: Mapping[str, Any] = field(default_factory=dict)
    shown: Mapping[str, Any] = field(default_factory=dict)
    space: Space = "core"
    spaces: tuple[Space, ...] = ()
    rank: str = "largest"
    check: Callable[[Any], object] | None = None
    per_adapter: tuple[str, ...] = ()
    prepare: Callable[[Survey, Any], Any] | None = None
    makes_rank: bool = False
    full_rank_in: tuple[Space, ...] = ()
    normalize: Normalize = "none"
    anchored: bool = False
    exact: bool = False
    separates: bool = False
    gauge_free: bool = True
    adapters: tuple[int, int | None] = (1, None)
    ordered: bool = False
    grams: bool = True
    sums: bool = False
    searches: bool = False
    needs: str = ""
    cost: str = "(d_in + d_out) R²"
    aliases: tuple[str, ...] = ()

    def parse(self, parameters: Mapping[str, Any]) -> Any:
        """Parameters from a recipe as the options object.

        Raises:
            MethodError: On an unknown name (with the nearest one), a value out of range, or values
                that do not go together.
        """
        given = {**self.presets, **parameters}
        options = parse_options(self.options, given, f"method {self.name}", self.ignores)
        if self.check is not None:
            self.check(options)
        return options

    def parameters(self) -> list[Parameter]:
        """Its parameters, for help texts and tables."""
        return describe_options(self.options, {**self.presets, **self.shown}, self.ignores)


def equal_ranks(stack: RankStack, what: str, remedy: str) -> tuple[int, int]:
    """(number of adapters, their common rank), for methods on A and B apart.

    Args:
        stack: The adapters that are present.
        what: Who asks, and at which module.
        remedy: What to do where ranks differ.

    Raises:
        MethodError: If the ranks differ.
    """
    ranks = [int((stack.owner == owner).sum()) for owner in stack.adapters]
    if len(set(ranks)) > 1:
        raise MethodError(f"{what}: the ranks differ: {', '.join(map(str, ranks))}", remedy)
    return len(ranks), ranks[0]
