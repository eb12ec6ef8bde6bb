"""Refuse an output before anything is read."""

from pathlib import Path


def check_out(out: Path, *inputs: str | Path | None, force: bool) -> None:
    """Refuse an output directory before anything is read, measured or downloaded."""
    from lora_merge.adapters.references import expand
    from lora_merge.files.targets import check_target

    named = [Path(ref).expanduser() for ref in expand([str(i) for i in inputs if i is not None])]
    check_target(out, force=force, inputs=[path for path in named if path.exists()])
