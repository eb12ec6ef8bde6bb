"""Methods that other packages bring."""

from collections.abc import Iterator
from typing import Any

import pytest

from lora_merge.errors import MethodError
from lora_merge.merge.methods import registry
from lora_merge.merge.methods.linear import weighted_sum
from lora_merge.merge.methods.method import Method


class Entry:
    name, value = "theirs", "package:method"

    def __init__(self, found: Any) -> None:
        self.found = found

    def load(self) -> Any:
        if isinstance(self.found, Exception):
            raise self.found
        return self.found


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    registry.methods.cache_clear()
    yield
    registry.methods.cache_clear()


def test_an_entry_point_adds_a_method(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = Method("theirs", "a sum", "theirs", weighted_sum, space="units", aliases=("other",))
    monkeypatch.setattr(registry, "entry_points", lambda group: [Entry(theirs)])
    assert registry.find_method("theirs") is theirs is registry.find_method("other")
    assert list(registry.methods())[-1] == "theirs"
    assert registry.find_method("svd") is registry.METHODS["svd"]


@pytest.mark.parametrize(
    "found",
    [ImportError("gone"), "no method", registry.METHODS["svd"]],
    ids=["broken", "no-method", "taken-name"],
)
def test_a_bad_entry_point_is_named(found: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "entry_points", lambda group: [Entry(found)])
    with pytest.raises(MethodError, match="theirs"):
        registry.methods()
    assert registry.find_method("svd").name == "svd"
