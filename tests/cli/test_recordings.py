"""The terminal recordings in docs/analysis.md are what the commands print today."""

import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from lora_merge.cli.app import cli

DOCUMENT = Path(__file__).parents[2] / "docs" / "analysis.md"
# In the order of the recordings; some show a part of the output.
COMMANDS = (
    "spectra sst2 --width 80",
    "spectra sst2 --module 5.*query --width 80",
    "resize sst2 --budget x0.5 --dry-run --width 80",
    "compare agnews sst2 subj trec --width 80",
    "compare agnews sst2 subj --module 5.*query --width 80",
)


def recordings() -> list[str]:
    return re.findall(
        r"^```text\n(.*?)^```$", DOCUMENT.read_text("utf-8"), re.DOTALL | re.MULTILINE
    )


def printed(command: str) -> str:
    result = CliRunner().invoke(cli, command.split(), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return "\n".join(line.rstrip() for line in result.stdout.splitlines()) + "\n"


def test_every_recording_has_its_command():
    assert len(recordings()) == len(COMMANDS)


@pytest.mark.parametrize("index", range(len(COMMANDS)), ids=lambda i: COMMANDS[i])
def test_recordings_are_the_output_of_today(index, shared, monkeypatch):
    monkeypatch.chdir(shared / "arena" / "adapters")
    assert recordings()[index] in printed(COMMANDS[index])
