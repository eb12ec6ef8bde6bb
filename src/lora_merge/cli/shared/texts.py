"""What commands share that run a mixture over texts: their options, and loading all three."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from lora_merge.cli.shared.options import together

if TYPE_CHECKING:
    from torch import nn

    from lora_merge.cli.shared.output import Output
    from lora_merge.mixture.mixture import Mixture
    from lora_merge.mixture.training.data import Dataset

# Rows need the base model's tokenizer to be read; that they are there is checked before it loads.
ROWS = click.Path(path_type=Path, exists=True, dir_okay=False)

text_options = together(
    click.argument("mixture", type=click.Path(path_type=Path)),
    click.option("--base", required=True, help="Base model: a directory or a Hub id."),
    click.option("--data", type=ROWS, required=True, help="JSON lines."),
)
batch_options = together(
    click.option("--max-length", type=click.IntRange(min=2), default=512, show_default=True),
    click.option("--batch-size", type=click.IntRange(min=1), default=8, show_default=True),
    click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:1."),
)


def load_texts(
    output: "Output", mixture: Path, *, base: str, data: Path, max_length: int, device: str
) -> "tuple[Mixture, nn.Module, Dataset]":
    """Open a mixture, load its base model and read the rows; the first bad rows are named."""
    from lora_merge.mixture.mixture import Mixture
    from lora_merge.mixture.training.base_model import load_base
    from lora_merge.mixture.training.data import read_examples

    opened = Mixture.from_pretrained(mixture)
    model, tokenizer = load_base(base, device)
    rows = read_examples(data, tokenizer, experts=opened.names, max_length=max_length)
    for fault in rows.faults[:5]:
        output.note(f"left out: {fault}")
    return opened, model, rows
