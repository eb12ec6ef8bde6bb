"""Completion in shells: click's own, and paths wherever nothing else is known."""

from click.shell_completion import (
    BashComplete,
    CompletionItem,
    FishComplete,
    ShellComplete,
    ZshComplete,
    add_completion_class,
)


class _Paths(ShellComplete):
    """Falls back to paths: adapters, models and data are mostly that."""

    def get_completions(self, args: list[str], incomplete: str) -> list[CompletionItem]:
        """What click knows, or a path."""
        found = super().get_completions(args, incomplete)
        if found or not args or incomplete.startswith("-"):
            return found
        return [CompletionItem(incomplete, type="file")]


class _Bash(_Paths, BashComplete):
    @staticmethod
    def _check_version() -> None:
        """Its own check starts a bash that knows only its own version, and says so on stderr."""


class _Zsh(_Paths, ZshComplete):
    pass


class _Fish(_Paths, FishComplete):
    pass


SHELLS: dict[str, type[ShellComplete]] = {"bash": _Bash, "zsh": _Zsh, "fish": _Fish}
for _name, _shell in SHELLS.items():
    add_completion_class(_shell, _name)
