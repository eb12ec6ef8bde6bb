"""Statistics of activations that data-driven merges need: collected once, kept in a file.

For task k, module m and the stacked A_c of all adapters: Z_k = mean of z z^T, z = A_c x, over the
inputs x that m sees while adapter k is active: R x R numbers, whatever the model's width
(SSR-Merge, ICML 2026). With `inputs`, also G_k = mean of x x^T, d_in x d_in (RegMean, 2212.09849).
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from lora_merge.adapters.access.adapter_like import AdaptersLike
from lora_merge.adapters.access.coerce import open_adapters
from lora_merge.adapters.alignment import Alignment, align, read_stacks
from lora_merge.adapters.rank_stack import RankStack
from lora_merge.arguments import checked
from lora_merge.errors import LoraMergeError
from lora_merge.files.atomic import atomic_file
from lora_merge.files.documents import parse_json, validated
from lora_merge.files.inputs import note_input
from lora_merge.files.targets import MARK
from lora_merge.files.tensor_stream import write_tensors

_LARGEST = 1e30  # of an entry; sums of squares of activations are far below


class StatisticsError(LoraMergeError):
    """Statistics that cannot be collected or do not fit the adapters."""


@dataclass(frozen=True, eq=False)
class Statistics:
    """A statistics file.

    Attributes:
        path: The file.
        adapters: Names of the adapters it was collected with, in its order.
    """

    path: Path
    adapters: tuple[str, ...]

    @classmethod
    def open(cls, path: str | Path) -> "Statistics":
        """Open a file that `collect_statistics` wrote.

        Raises:
            StatisticsError: If it is no such file.
        """
        note_input(path)
        try:
            with safe_open(str(path), framework="pt") as file:
                metadata = file.metadata() or {}
            where = f"{path}: its adapters"
            names = validated(list[str], parse_json(metadata["adapters"], where), where)
            return cls(Path(path), tuple(names))
        except Exception as error:  # any of half a dozen kinds, all meaning the same
            raise StatisticsError(
                f"{path} is no statistics file: {error}", "make one with collect_statistics"
            ) from error

    @cached_property
    def keys(self) -> frozenset[str]:
        """Names of the tensors."""
        with safe_open(str(self.path), framework="pt") as file:
            return frozenset(file.keys())

    def of(self, module: str, names: Sequence[str]) -> dict[str, Tensor]:
        """A module's tensors, adapters numbered as in `names`.

        Returns:
            "z.K" (R x R over the file's adapters), "x.K" where collected, float64, K the index of
            an adapter in `names`; "owner": index in `names` of each row of z, -1 for others.

        Raises:
            StatisticsError: If an adapter or the module is missing.
        """
        missing = [name for name in names if name not in self.adapters]
        if missing:
            raise StatisticsError(
                f"{self.path} has no statistics of {missing[0]}", "collect them with all adapters"
            )
        if f"{module}.owner" not in self.keys:
            raise StatisticsError(
                f"{self.path} has no statistics of {module}", "collect them with all adapters"
            )
        place = {self.adapters.index(name): index for index, name in enumerate(names)}
        found: dict[str, Tensor] = {}
        with safe_open(str(self.path), framework="pt") as file:
            owner = file.get_tensor(f"{module}.owner")
            if owner.dim() != 1 or owner.dtype != torch.int64:
                raise self._damaged(f"{module}.owner")
            found["owner"] = torch.tensor([place.get(o, -1) for o in owner.tolist()])
            for theirs, ours in place.items():
                for kind in "zx":
                    key = f"{module}.{kind}.{theirs}"
                    if key in self.keys:
                        tensor = file.get_tensor(key).to(torch.float64)
                        size = len(owner) if kind == "z" else len(tensor)
                        fits = tensor.shape == (size, size) and bool(tensor.isfinite().all())
                        if not fits or float(tensor.abs().max()) > _LARGEST:
                            raise self._damaged(key)
                        found[f"{kind}.{ours}"] = tensor
        return found

    def _damaged(self, name: str) -> StatisticsError:
        return StatisticsError(
            f"{self.path}: {name} is no finite square matrix of its size",
            "collect the statistics again",
        )


@checked()
def collect_statistics(
    model: nn.Module,
    adapters: AdaptersLike,
    batches: Mapping[str, Iterable[Any]] | Sequence[Iterable[Any]],
    out: str | Path,
    *,
    inputs: bool = False,
) -> Statistics:
    """Run each adapter's batches through the model with it active, and write what modules see.

    Args:
        model: The base model, without adapters. It is not changed.
        adapters: All adapters that will be merged.
        batches: For each adapter (in order, or by name) what the model is called with: mappings
            are keyword arguments, tuples positional ones, anything else the one argument. What
            an `attention_mask` among them leaves out does not count.
        out: The safetensors file to write.
        inputs: Collect d_in x d_in Grams, too (`regmean` needs them).

    Raises:
        StatisticsError: If a module is not in the model, or an adapter has no batches.

    Examples:
        >>> import lora_merge, torch
        >>> from transformers import AutoModelForCausalLM
        >>> model = AutoModelForCausalLM.from_pretrained("examples/base")
        >>> texts = [torch.arange(1, 13)[None]]
        >>> found = lora_merge.collect_statistics(
        ...     model, "examples/adapters/*", [texts] * 3, "statistics.safetensors")
        >>> len(found.adapters)
        3
    """
    opened = open_adapters(adapters)
    alignment = align(opened)
    stacks = {m.name: next(read_stacks(alignment, m)) for m in alignment.modules}
    targets = _targets(model, alignment)
    tensors: dict[str, Tensor] = {f"{name}.owner": s.owner for name, s in stacks.items()}
    for index, adapter in enumerate(opened):
        own = batches.get(adapter.name) if isinstance(batches, Mapping) else batches[index]
        totals: dict[str, Tensor] = {}
        counts: dict[str, int] = {}
        seen: dict[str, Tensor | None] = {}
        with _active(targets, stacks, index, totals, counts, inputs, seen), torch.no_grad():
            for batch in own or ():
                seen["mask"] = batch.get("attention_mask") if isinstance(batch, Mapping) else None
                _call(model, batch)
        if not counts:
            raise StatisticsError(f"{adapter.name}: no batches", "give every adapter some")
        for key, total in totals.items():
            module = key.rpartition(".")[0]
            tensors[f"{key}.{index}"] = (total / counts[module]).to(torch.float32).cpu()
    metadata = {"comment": MARK, "adapters": json.dumps([a.name for a in opened])}
    with atomic_file(Path(out), mark=MARK.encode()) as staging:
        write_tensors(staging, tensors, metadata)
    return Statistics.open(out)


def _targets(model: nn.Module, alignment: Alignment) -> dict[str, nn.Module]:
    """The model's module of each adapted module; a PEFT prefix on either side is forgiven."""
    modules = dict(model.named_modules())
    targets = {}
    for module in alignment.modules:
        if module.first.form != "linear":
            raise StatisticsError(
                f"{module.name} is a {module.first.form} module", "only linear ones have statistics"
            )
        found = [n for n in modules if n == module.name or module.name.endswith("." + n)]
        if not found:
            raise StatisticsError(
                f"the model has no module {module.name}", "give the adapters' base model"
            )
        targets[module.name] = modules[max(found, key=len)]
    return targets


@contextmanager
def _active(
    targets: Mapping[str, nn.Module],
    stacks: Mapping[str, RankStack],
    index: int,
    totals: dict[str, Tensor],
    counts: dict[str, int],
    inputs: bool,
    seen: Mapping[str, Tensor | None],
) -> Iterator[None]:
    """Hooks that add one adapter's delta and sum up what the modules see, padding apart."""

    def hook(name: str) -> Any:
        stack = stacks[name]
        own = stack.of_adapter(index)

        def run(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
            x = arguments[0]
            mask = seen.get("mask")
            padded = mask is not None and mask.shape == x.shape[:-1]
            flat = x[mask.bool()] if padded and mask is not None else x.reshape(-1, x.shape[-1])
            flat = flat.to(torch.float64)
            z = flat @ stack.down.to(flat).mT
            totals[f"{name}.z"] = totals.get(f"{name}.z", 0) + z.mT @ z
            if inputs:
                totals[f"{name}.x"] = totals.get(f"{name}.x", 0) + flat.mT @ flat
            counts[name] = counts.get(name, 0) + len(flat)
            update = (x @ own.down.to(x).mT) * own.scale.to(x) @ own.up.to(x).mT
            return output + update

        return run

    handles = [module.register_forward_hook(hook(name)) for name, module in targets.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _call(model: nn.Module, batch: Any) -> None:
    if isinstance(batch, Mapping):
        model(**batch)
    elif isinstance(batch, tuple):
        model(*batch)
    else:
        model(batch)
