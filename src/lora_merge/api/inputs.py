"""What functions of mixtures take: mixtures, base models and texts, as the caller has them.

A base is a directory, a Hub id, or a loaded model, which needs its tokenizer for texts. Data is a
file of JSON lines, or rows that were read from one.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from lora_merge.adapters.adapter import Adapter
from lora_merge.adapters.references import expand
from lora_merge.api.arguments.texts import Texts
from lora_merge.api.mixture_like import Base, Data, MixtureLike
from lora_merge.errors import MethodError
from lora_merge.files.targets import check_target
from lora_merge.mixture.mixture import Mixture
from lora_merge.mixture.training.base_model import load_base
from lora_merge.mixture.training.data import DataError, Dataset, Example, read_examples
from lora_merge.planning import Folder, Plan, Running

T = TypeVar("T")


def check_out(out: Folder | None, *inputs: Any, force: bool) -> None:
    """Refuse an output directory before anything is read, measured or downloaded.

    Args:
        out: The directory; None of a result in memory.
        inputs: What is read: paths, globs and Hub ids, opened adapters and mixtures, lists of them.
        force: Replace a directory that lora-merge wrote.
    """
    if out is not None:
        check_target(Path(out), force=force, inputs=list(_places(inputs)))


def _places(given: Any) -> Iterator[Path]:
    """The files and directories among what a caller gave."""
    if isinstance(given, str | os.PathLike):
        found = (Path(ref).expanduser() for ref in expand([os.fspath(given)]))
        yield from (path for path in found if path.exists())
    elif isinstance(given, Adapter):
        yield from given.files
    elif isinstance(given, list | tuple):
        for one in given:
            yield from _places(one)


def run(plan: Plan[T], given: Running, out: Folder | None) -> T:
    """Run a plan with the arguments that all functions have which make something."""
    if given.on_plan is not None:
        given.on_plan(plan)
    place = None if out is None else Path(out)
    return plan.run(place, force=given.force, jobs=given.jobs, progress=given.progress)


def opened_mixture(mixture: MixtureLike) -> Mixture:
    """A mixture, opened if it is a directory or a Hub id."""
    if isinstance(mixture, Mixture):
        return mixture
    return Mixture.from_pretrained(os.fspath(mixture))


def loaded_base(base: Base, tokenizer: Any, device: str) -> tuple[Any, Any]:
    """(model, tokenizer) of a base, loaded if it is a directory or a Hub id."""
    if isinstance(base, nn.Module):
        return base, tokenizer
    model, reader = load_base(os.fspath(base), device)
    return model, tokenizer or reader


def check_data(data: Data) -> None:
    """Refuse a file of rows that is not there, before a model is loaded to read it.

    Raises:
        DataError: If there is none.
    """
    if isinstance(data, str | os.PathLike) and (not Path(data).exists() or Path(data).is_dir()):
        raise DataError(f"{os.fspath(data)}: no such file", "give a UTF-8 JSON-lines file")


def read_rows(
    data: Data,
    tokenizer: Any,
    mixture: Mixture,
    max_length: int,
    *,
    strict: bool = False,
    on_data: Callable[[Dataset], None] | None = None,
) -> Sequence[Example]:
    """The rows that can be used.

    Raises:
        MethodError: If texts are to be read without a tokenizer.
    """
    if not isinstance(data, str | os.PathLike):
        found = Dataset(tuple(data), ())
    elif tokenizer is None:
        raise MethodError("a loaded model cannot read texts", "give its tokenizer, too")
    else:
        found = read_examples(
            Path(data), tokenizer, experts=mixture.names, max_length=max_length, strict=strict
        )
    if on_data is not None:
        on_data(found)
    return found.examples


def opened_texts(given: Texts) -> tuple[Mixture, nn.Module, Sequence[Example]]:
    """A mixture, its loaded base model, and the rows for them."""
    check_data(given.data)
    mixture = opened_mixture(given.mixture)
    model, reader = loaded_base(given.base, given.tokenizer, given.device)
    rows = read_rows(given.data, reader, mixture, given.max_length, on_data=given.on_data)
    return mixture, model, rows
