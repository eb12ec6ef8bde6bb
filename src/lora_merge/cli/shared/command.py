"""What all commands have in common: -v and -q, and help with its options in groups."""

from typing import Any

import click

# Group → the options in it, by their names in code; what stands in none is the command's own.
_GROUPS = {
    "Input": """accept_base_models allow_pickle alpha base base_name checkpoint data
        evaluation exclude general include modules names rename rslora statistics tuned weight
        weights""",
    "Result": """csv dtype each experts explain extras force html into out plot png
        print_recipe sort svg to top""",
    "Run": """address as_json batch_size bf16 device devices dry_run engine eval_every help jobs
        max_length cache quiet resume save_every seed shard strict verbose worker""",
}
_GROUP_OF = {name: group for group, names in _GROUPS.items() for name in names.split()}
OWN = "Options"
_QUIET = "lora_merge.quiet"


class Command(click.Command):
    """A command of lora-merge."""

    @classmethod
    def of(cls, command: click.Command, short_help: str) -> "Command":
        """The command with what all have, and what the list of commands says of it."""
        return cls(
            command.name,
            context_settings=command.context_settings,
            callback=command.callback,
            params=[*command.params, *verbosity_options()],
            help=command.help,
            epilog=command.epilog,
            short_help=short_help,
        )

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options: the command's own first, then what goes in, comes out, and how."""
        groups: dict[str, list[tuple[str, str]]] = {name: [] for name in (OWN, *_GROUPS)}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None and record[1]:  # arguments stand in the usage line
                groups[_GROUP_OF.get(_name(parameter), OWN)].append(record)
        for name, records in groups.items():
            if records:
                with formatter.section(name):
                    formatter.write_dl(records)


def _name(parameter: click.Parameter) -> str:
    return "help" if "--help" in parameter.opts else parameter.name or ""


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


def verbosity_options() -> list[click.Option]:
    """-q less, -v more, -vv all, before or after the command's name; fresh for a command."""
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
