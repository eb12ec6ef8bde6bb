"""`lora-merge info`: what an adapter is."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lora_merge.adapters.access.opening import BaseOptions
from lora_merge.cli.shared.fields import options_of
from lora_merge.cli.shared.options import Choice, adapters_argument, json_option

if TYPE_CHECKING:
    from lora_merge.adapters.adapter import Adapter
    from lora_merge.cli.shared.output import Output

_READERS = ("peft", "vllm", "sglang", "llama.cpp", "mlx", "diffusers", "comfyui")


@click.command
@adapters_argument
@click.option("--target", type=Choice(_READERS), help="What this reader would do with it.")
@options_of(BaseOptions)
@json_option
def command(adapters: tuple[str, ...], target: str | None, as_json: bool, **opening: Any) -> None:
    """Show what ADAPTERs are: format, base model, modules, ranks, norms, and what is odd.

    Of a mixture directory its gate and its experts; MIXTURE/experts/* are adapters as others are.
    """
    import lora_merge
    from lora_merge.cli.shared.api import shown_progress
    from lora_merge.cli.shared.output import Output
    from lora_merge.cli.views.info import info_view
    from lora_merge.mixture.formats.directory import is_mixture

    output = Output(as_json)
    if target is None and any(is_mixture(Path(one)) for one in adapters):
        _show_mixtures(output, adapters)
        return
    opened = lora_merge.open_adapters(adapters, **opening)
    if target is not None:
        _show_target(output, opened, target)
        return
    with shown_progress(output) as progress:
        infos = [lora_merge.info(one, progress=progress) for one in opened]
    data = [info.to_dict() for info in infos]
    shown = [part for info in infos for part in info_view(info)]
    output.data(data[0] if len(data) == 1 else {"schema": 1, "adapters": data}, *shown)


def _show_mixtures(output: "Output", references: tuple[str, ...]) -> None:
    """What mixture directories hold; adapters are looked at by themselves."""
    from lora_merge.cli.views.info import mixture_data, mixture_info
    from lora_merge.mixture.formats.directory import is_mixture
    from lora_merge.mixture.mixture import Mixture

    others = [one for one in references if not is_mixture(Path(one))]
    if others:
        raise click.UsageError(f"{others[0]} is no mixture: look at mixtures by themselves")
    mixtures = [Mixture.from_pretrained(one) for one in references]
    named = list(zip(references, mixtures, strict=True))
    data = [{**mixture_data(mixture, None), "name": name} for name, mixture in named]
    shown = [part for name, mixture in named for part in mixture_info(mixture, name)]
    output.data(data[0] if len(data) == 1 else {"schema": 1, "mixtures": data}, *shown)


def _show_target(output: "Output", adapters: "list[Adapter]", target: str) -> None:
    """What a reader drops, refuses or misreads, from the headers alone."""
    from dataclasses import asdict

    from rich.text import Text

    from lora_merge.adapters.formats.readers import READERS, predict

    data, lines = [], []
    for adapter in adapters:
        found = predict(adapter, target)
        findings = [asdict(finding) for finding in found]
        said = {"target": target, "seen": READERS[target].seen, "findings": findings}
        data.append({"schema": 1, "name": adapter.name, **said})
        told = [f"{target} {f.effect} {f.what}\n  try: {f.remedy}" for f in found]
        told = told or [f"nothing is known that {target} gets wrong"]
        lines += [f"{adapter.name}: {line}" for line in told]
    output.data(data[0] if len(data) == 1 else {"schema": 1, "adapters": data}, *map(Text, lines))
