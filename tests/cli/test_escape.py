"""Control characters from files do not reach a terminal."""

from pathlib import Path

import pytest

from builders import save_adapter
from lora_merge.cli.app import run
from lora_merge.cli.shared.escape import for_terminal


def test_what_a_terminal_obeys_is_shown() -> None:
    assert for_terminal("a\x1b[31mb\x07\u202ec\x9b\ud800\n\té") == (
        "a\\x1b[31mb\\x07\\u202ec\\x9b\\ud800\n\té"
    )


def test_names_from_a_config_do_not_colour_the_output(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a = save_adapter(tmp_path / "a", base_model_name_or_path="\x1b[31mred\x07")
    b = save_adapter(tmp_path / "b", base_model_name_or_path="other")
    for command in (["info", a], ["spectra", a], ["compare", a, b]):
        run([str(word) for word in command])
        said = capsys.readouterr()
        assert "red" in said.out + said.err or command[0] == "spectra"
        assert "\x1b" not in said.out + said.err and "\x07" not in said.out + said.err
