"""Whatever a caller has, as opened adapters: every public function takes them through here."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TypeAlias

from torch import nn

from lora_merge.adapters.access.live_peft import is_peft, live_names
from lora_merge.adapters.adapter import Adapter
from lora_merge.adapters.adapter import open_adapter as open_files
from lora_merge.adapters.base_weights import CheckpointBase
from lora_merge.adapters.config import AdapterConfig
from lora_merge.adapters.identity.rename import rename_all
from lora_merge.adapters.references import expand, resolve
from lora_merge.arguments import checked
from lora_merge.errors import SourceError
from lora_merge.files.checkpoint import open_checkpoint

# A path, a glob or a Hub reference; an opened adapter; a live PEFT model (all of its adapters).
AdapterLike: TypeAlias = Adapter | str | os.PathLike[str] | nn.Module
AdaptersLike: TypeAlias = AdapterLike | Iterable[AdapterLike]


@checked()
def open_adapters(
    adapters: AdaptersLike,
    *,
    alpha: float | None = None,
    rslora: bool = False,
    allow_pickle: bool = False,
    rename: Sequence[str] = (),
    base: str | os.PathLike[str] | None = None,
    rank: int | None = None,
) -> list[Adapter]:
    """Open adapters: only headers and configs are read.

    Args:
        adapters: One or several of: a directory, a `.safetensors` file, a glob, a Hub reference
            (`user/repo@revision:subfolder`), an `Adapter`, or a live `PeftModel`, which stands for
            all of its adapters, in the order they were added.
        alpha: `lora_alpha` of files without a config.
        rslora: Those files' scaling is alpha / sqrt(r).
        allow_pickle: Load `.bin` files, with `weights_only=True`.
        rename: Changes of module names, FROM=TO: paths that begin with FROM begin with TO instead
            ("layers=model.layers").
        base: The base model's directory, for forms whose delta depends on its weights.
        rank: Accept deltas of full rank, cut at this rank where a form can be cut as it is read.

    Returns:
        The adapters, in the order given; a glob's matches in the order of their names.

    Raises:
        SourceError: If a reference leads nowhere, a glob matches nothing, or a value is none of
            the above.
        AdapterError: If a file is no adapter that can be taken apart.

    Examples:
        >>> import lora_merge
        >>> [a.name for a in lora_merge.open_adapters("examples/adapters/*")]
        ['examples/adapters/double', 'examples/adapters/reverse', 'examples/adapters/upper']
    """
    fallback = None
    if alpha is not None:
        fallback = AdapterConfig(r=None, lora_alpha=alpha, use_rslora=rslora)
    model = None if base is None else CheckpointBase(open_checkpoint(Path(base)))
    given = [adapters] if isinstance(adapters, _SINGLE) else _listed(adapters)
    opened: list[Adapter] = []
    for one in given:
        if isinstance(one, Adapter):
            opened.append(one)
        elif isinstance(one, str | os.PathLike):
            opened += [
                open_files(
                    resolve(ref, allow_pickle=allow_pickle),
                    fallback=fallback,
                    base=model,
                    rank=rank,
                )
                for ref in expand([os.fspath(one)])
            ]
        elif isinstance(one, nn.Module) and is_peft(one):
            opened += [Adapter.from_peft(one, name) for name in live_names(one)]
        else:
            raise SourceError(
                f"a {type(one).__name__} is no adapter",
                "give a path, a glob, a Hub reference, an Adapter or a live PeftModel",
            )
    return rename_all(opened, rename)


@checked()
def open_adapter(
    adapter: AdaptersLike,
    *,
    alpha: float | None = None,
    rslora: bool = False,
    allow_pickle: bool = False,
    rename: Sequence[str] = (),
    base: str | os.PathLike[str] | None = None,
    rank: int | None = None,
) -> Adapter:
    """Open one adapter; arguments as for `open_adapters`, of which exactly one may be meant.

    Args:
        adapter: What stands for it.
        alpha: `lora_alpha` of a file without a config.
        rslora: That file's scaling is alpha / sqrt(r).
        allow_pickle: Load a `.bin` file, with `weights_only=True`.
        rename: Changes of module names, FROM=TO.
        base: The base model's directory, for forms whose delta depends on its weights.
        rank: Accept deltas of full rank.

    Raises:
        SourceError: If it leads nowhere, or stands for several adapters.
        AdapterError: If it is no adapter that can be taken apart.

    Examples:
        >>> import lora_merge
        >>> lora_merge.open_adapter("examples/adapters/upper")
        Adapter examples/adapters/upper
          base model  examples/base
          modules     14, rank 8
          parameters  18,944, F16
    """
    opened = open_adapters(
        adapter,
        alpha=alpha,
        rslora=rslora,
        allow_pickle=allow_pickle,
        rename=rename,
        base=base,
        rank=rank,
    )
    if len(opened) != 1:
        names = ", ".join(one.name for one in opened[:4]) or "none"
        raise SourceError(
            f"one adapter is wanted, not {len(opened)} ({names})",
            "name one; open_adapters opens several",
        )
    return opened[0]


_SINGLE = (Adapter, str, os.PathLike, nn.Module)


def _listed(adapters: object) -> list[object]:
    if isinstance(adapters, Iterable) and not isinstance(adapters, bytes | dict):
        return list(adapters)
    return [adapters]
