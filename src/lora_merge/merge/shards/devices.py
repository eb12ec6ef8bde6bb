"""A merge on several devices of one machine: a process for each, and a shard for each process."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import replace
from typing import Any

from lora_merge.errors import LoraMergeError, remedy_of
from lora_merge.machine.device import pick_device
from lora_merge.machine.parallel import default_jobs
from lora_merge.merge.recipe.arguments import RunShard
from lora_merge.merge.run import PlannedMerge
from lora_merge.merge.shards.shard import plan_for_shards, run_shard
from lora_merge.planning import counted


def on_devices(given: RunShard, devices: Sequence[str]) -> None:
    """Fill one shard per device, all at once, each in a process of its own.

    Args:
        given: As for `run_shard`; which shard it names does not matter.
        devices: "cuda:0", "cuda:1", ...; one may be given twice.

    Raises:
        LoraMergeError: What the first process that failed said; the others are stopped.
    """
    for device in devices:
        pick_device(device)
    plan, header = plan_for_shards(replace(given, device=devices[0]))
    if given.on_plan:
        given.on_plan(PlannedMerge(plan))
    step = counted(given.progress, "merging", len(plan.alignment.modules))
    threads = max(1, (given.jobs or default_jobs()) // len(devices))
    told = [
        {
            "recipe": header.recipe,
            "out": str(given.out),
            "shard": f"{number}/{len(devices)}",
            "device": device,
            "jobs": threads if device == "cpu" else None,
            "force": given.force,
            "resume": given.resume,
            "allow_pickle": given.allow_pickle,
        }
        for number, device in enumerate(devices, 1)
    ]
    processes = [_start(one) for one in told]
    try:
        with ThreadPoolExecutor(len(processes)) as readers:
            ends = [readers.submit(_follow, process, step) for process in processes]
            done, _ = wait(ends, return_when=FIRST_EXCEPTION)
            if any(end.exception() for end in done):
                for process in processes:
                    process.terminate()
        for end in sorted(ends, key=lambda one: one not in done):
            end.result()
    finally:
        for process in processes:
            process.kill()
            with process:  # waits, and closes its pipe
                pass


def _start(told: Mapping[str, Any]) -> "subprocess.Popen[str]":
    process = subprocess.Popen(
        [sys.executable, "-m", __name__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,  # Ctrl-C is this process's to see, which then ends them
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
    )
    assert process.stdin is not None
    process.stdin.write(json.dumps(told))
    process.stdin.close()
    return process


def _follow(process: "subprocess.Popen[str]", step: Callable[[], None]) -> None:
    """Read what a process says until it ends."""
    assert process.stdout is not None
    for line in process.stdout:
        said = json.loads(line)
        if "error" in said:
            raise LoraMergeError(*said["error"])
        step()
    if process.wait():
        raise LoraMergeError(
            f"a process of --devices ended with {process.returncode}",
            "look at its memory; --resume goes on with what is done",
        )


def _main() -> None:
    """One process: a shard, and a line of JSON for each module, or for what is wrong."""
    import yaml

    told = json.load(sys.stdin)

    def say(**what: Any) -> None:
        sys.stdout.write(json.dumps(what) + "\n")
        sys.stdout.flush()

    try:
        run_shard(
            yaml.safe_load(told.pop("recipe")),
            told.pop("out"),
            told.pop("shard"),
            **told,
            progress=lambda *_: say(),
        )
    except LoraMergeError as error:
        say(error=[error.message, error.remedy])
        sys.exit(1)
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        say(error=[f"{place}{error.strerror}", remedy_of(error, "check the path and its rights")])
        sys.exit(1)


if __name__ == "__main__":
    _main()
