"""A merge that one call runs in parts: to go on after a kill, on several devices, or on Ray."""

from functools import partial
from pathlib import Path

from lora_merge.adapters.in_memory import MadeAdapter
from lora_merge.errors import MethodError, OutputError
from lora_merge.merge.recipe.arguments import RunRecipe, RunShard
from lora_merge.merge.recipe.recipe import Recipe
from lora_merge.merge.report import MergeReport
from lora_merge.merge.shards.devices import on_devices
from lora_merge.merge.shards.folder import discard_shards, found_shards, shards_of
from lora_merge.merge.shards.join import join
from lora_merge.merge.shards.ray_engine import on_ray
from lora_merge.merge.shards.shard import fill_shard, here


def run_in_parts(recipe: Recipe, given: RunRecipe) -> MadeAdapter[MergeReport]:
    """`run_recipe`, with results that wait in `OUT.shards`.

    Args:
        recipe: What to merge.
        given: All else.

    Raises:
        LoraMergeError: As there; what was done is left only where `resume` asks for it.
    """
    devices = [one.strip() for one in (given.devices or "").split(",") if one.strip()]
    if given.out is None:
        raise OutputError("a merge in parts is made in a directory", "give one: out")
    if given.engine == "ray" and devices:
        raise MethodError("--devices are of this machine", "leave --engine ray or --devices out")
    if given.address and given.engine != "ray":
        raise MethodError("--address is that of a Ray cluster", "give --engine ray with it")
    out = Path(given.out)
    if found_shards(out) and not (given.resume or given.force):
        raise OutputError(
            f"{shards_of(out)} holds parts of an earlier run",
            "--resume to go on with them, or --force to begin again",
        )
    work = RunShard(
        recipe,
        out,
        "1/1",
        force=given.force,
        resume=given.resume,
        allow_pickle=given.allow_pickle,
        jobs=given.jobs,
        device=given.device,
        on_plan=given.on_plan,
        progress=given.progress,
    )
    try:
        if devices:
            on_devices(work, devices)
        elif given.engine == "ray":
            fill_shard(work, partial(on_ray, address=given.address))
        else:
            fill_shard(work, here)
        return join(out, force=given.force, strict=given.strict, jobs=given.jobs)
    except BaseException:
        if not given.resume:
            discard_shards(out)
        raise
