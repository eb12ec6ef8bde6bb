"""Model cards, and the one way a name from a file gets into their YAML and their Markdown."""

import re
from collections.abc import Sequence
from typing import Any

from huggingface_hub import ModelCardData


def front_matter(**fields: Any) -> str:
    """The YAML head of a card, by the Hub's own writer: every value stays that of its field."""
    texts: dict[str, Any] = {
        name: one_line(value) if isinstance(value, str) else value for name, value in fields.items()
    }
    return f"---\n{ModelCardData(**texts).to_yaml()}\n---\n"


def code(text: str) -> str:
    """A name as a code span, which nothing in it ends; also in a table."""
    plain = one_line(text).replace("|", "\\|")
    fence = "`" * (1 + max(map(len, re.findall("`+", plain)), default=0))
    space = " " if "`" in plain else ""
    return f"{fence}{space}{plain}{space}{fence}"


def markdown(text: str) -> str:
    """A sentence with names in it: no HTML, no table and no new line comes of them."""
    return one_line(text).replace("<", "&lt;").replace("|", "\\|")


def one_line(text: str) -> str:
    """A text without line breaks and control characters."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]+", " ", text).strip()


def block(text: str, language: str) -> str:
    """A text as a code block, which nothing in it ends."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text.rstrip()}\n{fence}\n"


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
    head = front_matter(
        base_model=base_model,
        library_name="peft",
        tags=["lora", "merge", "peft", "lora-merge"],
        base_model_relation="adapter" if base_model else None,
    )
    rows = "\n".join(f"| {code(name)} | {markdown(weight)} |" for name, weight in sources)
    remarks = "".join(f"- {markdown(note)}\n" for note in notes)
    return (
        f"{head}\n# {title}\n\n"
        f"A LoRA adapter{f' for {code(base_model)}' if base_model else ''}, merged from "
        f"{len(sources)} adapters: {method}.\n\n"
        f"| adapter | weight |\n| --- | --- |\n{rows}\n\n"
        + (f"{remarks}\n" if remarks else "")
        + "The scaling is folded into the weights (`lora_alpha` = `r`).\n\n"
        "## Recipe\n\n"
        "`lora-merge run lora_merge.yaml -o DIR` makes the same bytes again.\n\n"
        + block(recipe, "yaml")
    )


def short_card(title: str, base_model: str | None, text: str) -> str:
    """Text of `README.md` of an adapter that was not merged: metadata, a heading, a paragraph."""
    head = front_matter(
        base_model=base_model,
        library_name="peft",
        tags=["lora", "peft", "lora-merge"],
        base_model_relation="adapter" if base_model else None,
    )
    return f"{head}\n# {title}\n\n{text}\n"


def fused_card(title: str, base_model: str | None, text: str, licence: str | None) -> str:
    """Text of `README.md` of a whole model: metadata, a heading, a paragraph.

    Args:
        title: Heading.
        base_model: Name of the model that the adapter was added to, if known.
        text: What it is.
        licence: The base's, as the Hub names it, if it says.
    """
    head = front_matter(
        base_model=base_model,
        library_name="transformers",
        license=licence,
        tags=["merge", "lora-merge"],
        base_model_relation="finetune" if base_model else None,
    )
    return f"{head}\n# {title}\n\n{text}\n"
