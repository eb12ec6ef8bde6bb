"""The one table of merge methods, and what a method is."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from typing import Any, Literal, get_args, get_origin

import numpy as np
from torch import Tensor

from lora_merge.adapters import RankStack
from lora_merge.errors import MethodError
from lora_merge.merge.lego import LegoOptions, lego


@dataclass(frozen=True, eq=False)
class Job:
    """What a method is told besides the stack.

    Attributes:
        module: Name of the module (with the expert's index, where there are several).
        rank: Rank that is asked for, at most the stack's units.
        weights: Weight of each adapter, float64, shape (N,), indexed by owner.
        seed: The merge's seed.
    """

    module: str
    rank: int
    weights: Tensor
    seed: int

    def rng(self) -> np.random.Generator:
        """Random numbers of this module: the same whatever else is merged, and in what order."""
        digest = hashlib.blake2b(f"{self.seed}:{self.module}".encode(), digest_size=8).digest()
        return np.random.default_rng(int.from_bytes(digest, "little"))


@dataclass(frozen=True, eq=False)
class Outcome:
    """What a method makes of one stack.

    Attributes:
        stack: The merged units.
        details: What the report should say of this module, as JSON values.
        mixes: Where the merged units are combinations of the stack's: their coefficients for
            `down` and for `up`, float64, each (k, R). The report then needs no further pass over
            the vectors.
    """

    stack: RankStack
    details: Mapping[str, Any] = field(default_factory=dict)
    mixes: tuple[Tensor, Tensor] | None = None


@dataclass(frozen=True)
class Method:
    """A merge method.

    Attributes:
        name: Its name in recipes and on the command line.
        summary: What it does, in a line.
        paper: Where it is from.
        options: Frozen dataclass of its parameters with their defaults.
        run: (stack, job, options) → outcome.
    """

    name: str
    summary: str
    paper: str
    options: type[Any]
    run: Callable[[RankStack, Job, Any], Outcome]

    def parse(self, parameters: Mapping[str, Any]) -> Any:
        """Parameters from a recipe as the options object.

        Raises:
            MethodError: On an unknown name (with the nearest one) or a value out of range.
        """
        known = {f.name: f for f in fields(self.options)}
        for name, value in parameters.items():
            if name not in known:
                near = get_close_matches(name, known, n=1)
                raise MethodError(
                    f"method {self.name} has no parameter {name!r}",
                    f"did you mean {near[0]!r}?" if near else f"it has: {', '.join(known)}",
                )
            _check_value(self.name, name, known[name].type, value)
        return self.options(**parameters)


def find_method(name: str) -> Method:
    """The method of this name.

    Raises:
        MethodError: If there is none; says the nearest name.
    """
    if name in METHODS:
        return METHODS[name]
    near = get_close_matches(name, METHODS, n=1)
    raise MethodError(
        f"there is no method {name!r}",
        f"did you mean {near[0]!r}?" if near else f"choose from: {', '.join(METHODS)}",
    )


def _check_value(method: str, name: str, kind: Any, value: Any) -> None:
    if get_origin(kind) is Literal:
        allowed = get_args(kind)
        if value not in allowed:
            raise MethodError(
                f"method {method}: {name} is {value!r}", f"choose from: {', '.join(allowed)}"
            )
    elif type(value) is not kind and not (kind is float and type(value) is int):
        raise MethodError(
            f"method {method}: {name} is {value!r}, not {kind.__name__}", "correct it"
        )


def _lego(stack: RankStack, job: Job, options: LegoOptions) -> Outcome:
    weighted = stack.weighted(job.weights)
    result = lego(weighted, job.rank, options=options, rng=job.rng())
    return Outcome(result.stack, {"cluster_sizes": result.cluster_sizes}, result.mixes)


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method(
            name="lego",
            summary="cluster rank-wise units; centroids become the merged adapter (LoRA-LEGO)",
            paper="arXiv 2409.16167",
            options=LegoOptions,
            run=_lego,
        ),
    )
}
