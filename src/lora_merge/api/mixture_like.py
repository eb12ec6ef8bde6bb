"""What stands for a mixture, a base model and rows: the types of whatever a caller has."""

from collections.abc import Sequence
from typing import TypeAlias

from torch import nn

from lora_merge.mixture.mixture import Mixture
from lora_merge.mixture.training.data import Example
from lora_merge.planning import Folder

# A directory or Hub id, or what it was opened or loaded or read as.
MixtureLike: TypeAlias = Mixture | Folder
Base: TypeAlias = Folder | nn.Module
Data: TypeAlias = Folder | Sequence[Example]
