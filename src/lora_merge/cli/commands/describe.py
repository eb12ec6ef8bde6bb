"""`lora-merge describe`: what each expert's texts look like inside the base model."""

from pathlib import Path
from typing import Any

import click

from lora_merge.api.arguments.texts import Describe
from lora_merge.cli.shared.fields import options_of
from lora_merge.cli.shared.options import force_option, json_option
from lora_merge.cli.shared.texts import Rows, mixture_argument


@click.command(
    epilog="""\b
Examples:
  lora-merge describe mix --base ./llama --data labelled.jsonl -o described
  lora-merge novelty described --base ./llama --data new.jsonl
""",
)
@mixture_argument
@options_of(Describe)
@click.option("--module", "modules", multiple=True, help="Where.  [default: once per layer]")
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="To make.")
@force_option("a mixture directory")
@json_option
def command(
    mixture: Path, modules: tuple[str, ...], out: Path, force: bool, as_json: bool, **given: Any
) -> None:
    """Write MIXTURE again with a descriptor of each expert that has rows in DATA.

    `lora-merge novelty` then tells whether other texts need an expert that is not there yet.
    """
    import lora_merge
    from lora_merge.cli.shared.open import check_out
    from lora_merge.cli.shared.output import Output

    output = Output(as_json)
    check_out(out, mixture, given["base"], given["data"], force=force)
    described = lora_merge.describe(mixture, **given, modules=modules or None, on_data=Rows(output))
    described.save_pretrained(out, force=force)
    known = described.descriptors
    experts = list(known.experts) if known else []
    places = known.modules if known else []
    result = {"schema": 1, "out": str(out), "experts": experts, "modules": places}
    output.data(result, f"wrote {out}: {', '.join(experts)} described at {len(places)} modules")
