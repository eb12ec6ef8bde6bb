"""`lora-merge completion`: what a shell needs to complete our command lines."""

import sys

import click

from lora_merge.cli.shared.options import Choice


@click.command(
    epilog="""\b
Install it:
  echo 'eval "$(lora-merge completion bash)"' >> ~/.bashrc
  echo 'eval "$(lora-merge completion zsh)"' >> ~/.zshrc
  lora-merge completion fish > ~/.config/fish/completions/lora-merge.fish
""",
)
@click.argument("shell", type=Choice(["bash", "zsh", "fish"]))
def command(shell: str) -> None:
    """Print a script that lets SHELL complete commands, options, methods and paths."""
    from lora_merge.cli.app import COMPLETE, cli
    from lora_merge.cli.shared.completion import SHELLS

    sys.stdout.write(SHELLS[shell](cli, {}, "lora-merge", COMPLETE).source() + "\n")
