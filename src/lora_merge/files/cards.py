"""The model card of a merged adapter."""

from collections.abc import Sequence

from huggingface_hub import ModelCardData


def model_card(
    *,
    title: str,
    base_model: str | None,
    sources: Sequence[tuple[str, str]],
    method: str,
    recipe: str,
    notes: Sequence[str] = (),
) -> str:
    """Text of `README.md` with metadata that the Hub understands.

    Args:
        title: Heading.
        base_model: Name of the base model, if known.
        sources: (reference, weight) of each adapter.
        method: One line on the method.
        recipe: The recipe as YAML.
        notes: What a user of the result should know.
    """
    data = ModelCardData(
        base_model=base_model,
        library_name="peft",
        tags=["lora", "merge", "peft", "lora-merge"],
        base_model_relation="adapter" if base_model else None,
    )
    rows = "\n".join(f"| `{name}` | {weight} |" for name, weight in sources)
    remarks = "".join(f"- {note}\n" for note in notes)
    return (
        f"---\n{data.to_yaml()}\n---\n\n# {title}\n\n"
        f"A LoRA adapter{f' for `{base_model}`' if base_model else ''}, merged from "
        f"{len(sources)} adapters: {method}.\n\n"
        f"| adapter | weight |\n| --- | --- |\n{rows}\n\n"
        + (f"{remarks}\n" if remarks else "")
        + "The scaling is folded into the weights (`lora_alpha` = `r`).\n\n"
        "## Recipe\n\n"
        "`lora-merge run lora_merge.yaml -o DIR` makes the same bytes again.\n\n"
        f"```yaml\n{recipe}```\n"
    )


def short_card(title: str, base_model: str | None, text: str) -> str:
    """Text of `README.md` of an adapter that was not merged: metadata, a heading, a paragraph."""
    data = ModelCardData(
        base_model=base_model,
        library_name="peft",
        tags=["lora", "peft", "lora-merge"],
        base_model_relation="adapter" if base_model else None,
    )
    return f"---\n{data.to_yaml()}\n---\n\n# {title}\n\n{text}\n"


def fused_card(title: str, base_model: str | None, text: str, licence: str | None) -> str:
    """Text of `README.md` of a whole model: metadata, a heading, a paragraph.

    Args:
        title: Heading.
        base_model: Name of the model that the adapter was added to, if known.
        text: What it is.
        licence: The base's, as the Hub names it, if it says.
    """
    data = ModelCardData(
        base_model=base_model,
        library_name="transformers",
        license=licence,
        tags=["merge", "lora-merge"],
        base_model_relation="finetune" if base_model else None,
    )
    return f"---\n{data.to_yaml()}\n---\n\n# {title}\n\n{text}\n"
