"""Arguments of `tune` and `check_kernels`."""

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Literal

from lora_merge.options import argument, option
from lora_merge.planning import Telling

if TYPE_CHECKING:
    from lora_merge.api.mixture_like import MixtureLike


@dataclass(frozen=True)
class CheckKernels(Telling):
    """Arguments of `check_kernels`."""

    device: str = option("auto", "auto, cpu, cuda or cuda:1")


@dataclass(frozen=True)
class Tune(Telling):
    """Arguments of `tune`."""

    mixture: "MixtureLike | None" = argument(
        None, "whose shapes; default: the modules of Llama-3-8B"
    )
    _: KW_ONLY
    experts: int = option(8, "without a mixture: how many", low=1)
    rank: int = option(16, "without a mixture: their rank", low=1)
    tokens: Sequence[int] = option((), "tokens of a pass; default: 1, 16 and 256")
    dtype: Literal["float32", "float16", "bfloat16"] | None = option(
        None, "of the experts", unset="bfloat16 on a GPU, else float32"
    )
    device: str = option("auto", "auto, cpu, cuda or cuda:1")
    rounds: int = option(9, "how often each is timed", low=1)
    graph: bool = option(False, "time CUDA graphs instead of separate launches")
    dry_run: bool = option(False, "measure and show, keep nothing")
