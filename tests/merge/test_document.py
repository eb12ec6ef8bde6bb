"""The published documents are those that the code makes."""

import json
from pathlib import Path

from lora_merge.merge.document import methods_page, recipe_schema
from lora_merge.merge.methods.registry import METHODS

DOCS = Path(__file__).resolve().parents[2] / "docs"
REMAKE = "remake it: python -m lora_merge.merge.document"


def test_methods_page_is_up_to_date() -> None:
    assert (DOCS / "methods.md").read_text(encoding="utf-8") == methods_page(), REMAKE
    assert all(f"### {name}\n" in methods_page() for name in METHODS)


def test_recipe_schema_is_up_to_date() -> None:
    assert json.loads((DOCS / "recipe.schema.json").read_text()) == recipe_schema(), REMAKE
    assert recipe_schema()["additionalProperties"] is False


def test_the_readme_counts_methods_and_no_two_are_the_same_row() -> None:
    readme = (DOCS.parent / "README.md").read_text(encoding="utf-8")
    assert f"any of {len(METHODS)} methods" in readme
    rows = [
        (m.combine, m.options, str(m.presets), m.space, str(m.spaces), m.rank, m.normalize)
        for m in METHODS.values()
    ]
    assert len(set(rows)) == len(rows)
