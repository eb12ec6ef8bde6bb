"""Trees drawn with line characters."""

from lora_merge.analysis.families import Tree
from lora_merge.cli.views.dendrogram import dendrogram


def test_lines_meet_where_groups_join():
    tree = Tree(merges=((2, 3), (0, 1), (5, 4)), heights=(0.25, 0.5, 1.0), order=(0, 1, 2, 3))
    lines = dendrogram(tree, ["a", "b", "c", "d"], 14, plain=False).plain.splitlines()
    assert lines[1:] == [
        "a ─────┬────┐",
        "b ─────┘    │",
        "c ──┬───────┘",
        "d ──┘",
        "  0         1",
    ]


def test_equal_heights_stay_connected():
    tree = Tree(merges=((2, 3), (1, 4), (0, 5)), heights=(1.0, 1.0, 1.0), order=(0, 1, 2, 3))
    lines = dendrogram(tree, ["a", "b", "c", "d"], 20, plain=False).plain.splitlines()
    assert [line[-1] for line in lines[1:5]] == ["┐", "┤", "┤", "┘"]
    plain = dendrogram(tree, ["a", "b", "c", "d"], 20, plain=True).plain
    assert plain.isascii()
