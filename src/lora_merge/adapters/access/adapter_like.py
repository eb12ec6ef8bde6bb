"""What stands for an adapter: the types of whatever a caller has."""

import os
from collections.abc import Iterable
from typing import TypeAlias

from torch import nn

from lora_merge.adapters.adapter import Adapter

# A path, a glob or a Hub reference; an opened adapter; a live PEFT model (all of its adapters).
AdapterLike: TypeAlias = Adapter | str | os.PathLike[str] | nn.Module
AdaptersLike: TypeAlias = AdapterLike | Iterable[AdapterLike]
