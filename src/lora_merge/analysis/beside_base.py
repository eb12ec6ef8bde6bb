"""Deltas beside the weights they change: relative size, amplification, intruder dimensions."""

import contextlib
import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_merge.adapters.adapter import Adapter
from lora_merge.adapters.base_names import weight_of
from lora_merge.adapters.forms import to_matrix
from lora_merge.adapters.measured.spectra import AdapterSpectra, ModuleSpectrum
from lora_merge.adapters.references import derived_data
from lora_merge.errors import AdapterError, OutputError
from lora_merge.files.atomic import atomic_file
from lora_merge.files.checkpoint import Checkpoint
from lora_merge.files.documents import read_cache
from lora_merge.files.tensor_file import LARGEST_ENTRY, refuse_non_finite
from lora_merge.linalg.factors import frobenius
from lora_merge.linalg.range_finder import leading_svd
from lora_merge.machine.parallel import in_order
from lora_merge.printing import Report, Summary

_TOP = 10
_SIMILAR = 0.5


@dataclass(frozen=True)
class BaseRelation:
    """One module's delta beside its base weight.

    Attributes:
        module: Module path.
        base_frobenius: ||W||_F.
        base_spectral: ||W||_2, by subspace iteration.
        relative: ||D||_F / ||W||_F.
        relative_spectral: ||D||_2 / ||W||_2.
        amplification: ||D||_F / ||U^T W V||_F with U, V the delta's singular vectors (LoRA paper,
            section 7.3): how much it strengthens directions that W already has.
        intruders: How many of the 10 leading left singular vectors of W + D have no counterpart
            in W with |cosine| >= 0.5 (arXiv 2410.21228); None where not asked for.
    """

    module: str
    base_frobenius: float
    base_spectral: float
    relative: float
    relative_spectral: float
    amplification: float | None
    intruders: int | None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


@dataclass(frozen=True, repr=False)
class BaseReport(Report):
    """All modules of an adapter beside a base model.

    Attributes:
        relations: Modules that were found, in order.
        missing: Adapted modules whose weight the base model does not have.
    """

    relations: tuple[BaseRelation, ...]
    missing: tuple[str, ...]

    def summary(self) -> Summary:
        """The largest changes relative to the base's weights."""
        largest = sorted(self.relations, key=lambda one: -one.relative)[:5]
        facts = [(one.module, f"{100 * one.relative:.2g} % of its weight") for one in largest]
        if self.missing:
            facts.append(("missing", f"{len(self.missing)} weights that the base does not have"))
        return Summary(f"{len(self.relations)} modules beside the base", tuple(facts))

    def rows(self) -> list[dict[str, Any]]:
        """One row per module."""
        return [relation.to_dict() for relation in self.relations]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {"modules": [r.to_dict() for r in self.relations], "missing": list(self.missing)}


def relate_to_base(
    adapter: Adapter,
    spectra: AdapterSpectra,
    checkpoint: Checkpoint,
    *,
    intruders: bool = False,
    cache: Path | None = None,
    jobs: int | None = None,
    on_module: Callable[[], None] | None = None,
) -> BaseReport:
    """Compare every measured module with its base weight; one weight is in memory per worker.

    Args:
        adapter: The adapter.
        spectra: Its spectra with cores kept.
        checkpoint: The base model.
        intruders: Look for intruder dimensions.
        cache: File that remembers spectral norms and intruders by the tensors' content.
        jobs: Worker threads.
        on_module: Called after each module.

    Raises:
        AdapterError: If a weight does not fit its module.
    """
    known = _load(cache)

    def one(module: ModuleSpectrum) -> BaseRelation | None:
        weight = weight_of(adapter, module.spec, checkpoint)
        if weight is None:
            return None
        return _relate(adapter, module, weight, known, intruders)

    found: list[BaseRelation] = []
    missing: list[str] = []
    for module, relation in zip(
        spectra.finite, in_order(one, spectra.finite, jobs=jobs), strict=True
    ):
        if relation is None:
            missing.append(module.name)
        else:
            found.append(relation)
        if on_module:
            on_module()
    _save(cache, known)
    return BaseReport(tuple(found), tuple(missing))


def base_weights(
    adapter: Adapter, checkpoint: Checkpoint, *, jobs: int | None = None
) -> dict[str, float]:
    """1 / ||W||_F^2 by module: weights that make a budget count errors relative to the base.

    Raises:
        AdapterError: If a module has no weight there, or it does not fit.
    """

    def one(name: str) -> float:
        spec = adapter.modules[name]
        weight = weight_of(adapter, spec, checkpoint)
        if weight is None:
            raise AdapterError(
                f"{checkpoint.folder}: no weight of {name} there", "name the adapter's base model"
            )
        square = frobenius(weight) ** 2
        return 1 / square if square > 0 else 1.0

    names = list(adapter.modules)
    return dict(zip(names, in_order(one, names, jobs=jobs), strict=True))


def _relate(
    adapter: Adapter, module: ModuleSpectrum, weight: Tensor, known: dict[str, float], deep: bool
) -> BaseRelation:
    base_frobenius = frobenius(weight)
    if not base_frobenius <= LARGEST_ENTRY:
        refuse_non_finite(weight, f"the base's {module.module}")
    content = _content(weight)
    if content not in known:
        known[content] = float(leading_svd(weight, 1).s[0])
    base_spectral = known[content]
    a, b = adapter.read(module.module)
    down, up = to_matrix(module.spec, a, b, module.expert or 0)
    measures = module.measures
    assert measures is not None and module.core is not None
    amplification, intruders = None, 0 if deep else None
    if module.status == "ok":
        rank = measures.numerical_rank
        left, right = module.core.truncate(rank)
        root = module.core.values[:rank].sqrt()
        u = up.double() @ (left / root)
        vh = (right / root[:, None]) @ down.double()
        inside = torch.linalg.matrix_norm(u.float().mT @ weight @ vh.float().mT)
        amplification = measures.frobenius / float(inside) if float(inside) > 0 else None
        if deep:
            key = f"{content} intruders {_content(down, up)} {module.spec.scaling!r}"
            if key not in known:
                largest = max(measures.frobenius, base_frobenius)  # so that nothing overflows
                values = module.core.values[:rank] * (module.spec.scaling / largest)
                delta = (u * values).float() @ vh.float()
                known[key] = count_intruders((weight / largest).float(), delta)
            intruders = int(known[key])
    return BaseRelation(
        module.name,
        base_frobenius,
        base_spectral,
        measures.frobenius / base_frobenius if base_frobenius > 0 else 0.0,
        measures.spectral / base_spectral if base_spectral > 0 else 0.0,
        amplification,
        intruders,
    )


def count_intruders(
    weight: Tensor, delta: Tensor, *, top: int = _TOP, similar: float = _SIMILAR
) -> int:
    """Leading left singular vectors of `weight + delta` that resemble none of `weight`'s.

    The cheap test comes first: a vector whose value comes mostly from `weight`
    (u^T delta v < s / 2) is a rotated direction of the base. Only where some are left is the SVD
    of `weight` computed.

    Args:
        weight: Shape (m, n), float32.
        delta: Shape (m, n), float32.
        top: How many leading vectors to look at.
        similar: |cosine| from which on a direction counts as the base's.
    """
    tuned = leading_svd(weight + delta, min(top, *weight.shape))
    u, vh = tuned.u, tuned.vh
    share = ((u.mT @ delta) * vh).sum(1).double() / tuned.s.clamp_min(1e-300)
    suspects = u[:, share >= 0.5]
    if suspects.shape[1] == 0:
        return 0
    directions = torch.linalg.svd(weight, full_matrices=False).U
    best = (directions.mT @ suspects).abs().amax(0)
    return int((best < similar).sum())


def default_cache() -> Path:
    """Where spectral norms of base models, and intruders beside them, are remembered."""
    return derived_data("base-norms") / "norms.json"


def _content(*tensors: Tensor) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _load(cache: Path | None) -> dict[str, float]:
    """What is remembered; a damaged or missing file is nothing."""
    return (cache and read_cache(dict[str, float], cache)) or {}


def _save(cache: Path | None, known: dict[str, float]) -> None:
    """Remember; a place that cannot be written costs time, not the result."""
    if cache is None:
        return
    with contextlib.suppress(OSError, OutputError):
        cache.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(cache) as path:
            path.write_text(json.dumps(known, sort_keys=True), encoding="utf-8")
