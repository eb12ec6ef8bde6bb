"""How much a command says beside its result: -q less, -v more; before or after its name."""

from typing import Any

import click

_QUIET = "lora_merge.quiet"


def is_quiet() -> bool:
    """Whether the command that runs was asked for its result alone."""
    context = click.get_current_context(silent=True)
    return bool(context and context.meta.get(_QUIET))


def _be_quiet(context: click.Context, _: click.Parameter, value: bool) -> None:
    if value:
        import warnings

        context.meta[_QUIET] = True
        context.with_resource(warnings.catch_warnings())
        warnings.simplefilter("ignore")


def _log(context: click.Context, _: click.Parameter, value: int) -> None:
    """Show what the library logs under `lora_merge`, until the command ends."""
    if not value:
        return
    import logging

    logger, handler = logging.getLogger("lora_merge"), logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(relativeCreated)6d ms  %(name)s: %(message)s"))
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG if value > 1 else logging.INFO)

    def undo() -> None:
        logger.removeHandler(handler)
        logger.setLevel(before)

    context.call_on_close(undo)


def options() -> list[click.Option]:
    """The two options, fresh for a command."""
    shared: dict[str, Any] = {"expose_value": False, "is_eager": True}
    return [
        click.Option(
            ["-v", "--verbose"],
            count=True,
            callback=_log,
            help="Say on stderr what is done; -vv: module by module.",
            **shared,
        ),
        click.Option(
            ["-q", "--quiet"],
            is_flag=True,
            callback=_be_quiet,
            help="No notes, warnings or progress.",
            **shared,
        ),
    ]
