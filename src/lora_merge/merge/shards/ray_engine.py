"""A merge on a Ray cluster: tasks of some modules each, whose results stream back to the driver.

A task gets what a shard's header says, plans from the adapters' headers (once per worker process)
and sends back the files that it would have left in a shard's folder. Ray does a lost task again.
"""

import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

from lora_merge.errors import LoraMergeError, OutputError
from lora_merge.files.documents import validated
from lora_merge.merge.executor import compute
from lora_merge.merge.module_work import module_bytes
from lora_merge.merge.plan import MergePlan
from lora_merge.merge.shards.facts import difference, facts_of
from lora_merge.merge.shards.folder import Header
from lora_merge.merge.shards.shard import Work, planned_again
from lora_merge.merge.waiting_results import Spool

# Tasks that wait or run per CPU: the driver holds so many results at most.
_AHEAD = 2
# Tasks per CPU: fewer have less overhead, more leave less to do again and end together.
_TASKS = 4
# What a worker process needs beside the stacks: Python, torch and headers.
_PROCESS = 600_000_000
_RETRIES = 5

_Task = tuple[tuple[str, ...], tuple[str, ...]]
_Result = tuple[dict[str, bytes], tuple[str, str] | None]


def on_ray(work: Work, *, address: str | None = None) -> None:
    """Do a shard's work on a Ray cluster.

    Args:
        work: What is to be done.
        address: Of the cluster, "auto" finds it; None starts one on this machine.

    Raises:
        LoraMergeError: If Ray is not installed, the cluster cannot be reached, a module needs more
            memory than any machine has, or the work itself fails.
    """
    ray = _ray()
    with _connected(ray, address, work.jobs):
        cpus = int(ray.cluster_resources().get("CPU", 1))
        tasks = list(_tasks(work, cpus))
        header = ray.put((asdict(work.header), str(Path.cwd())))
        remote = ray.remote(_run)
        waiting: dict[Any, _Task] = {}
        largest = max((node["Resources"].get("memory", 0) for node in ray.nodes()), default=0)
        while tasks or waiting:
            while tasks and len(waiting) < _AHEAD * cpus:
                task = tasks.pop(0)
                options = {
                    "num_cpus": 1,
                    "max_retries": _RETRIES,
                    "memory": _memory(work.plan, task[0], largest),
                }
                waiting[remote.options(**options).remote(header, *task)] = task
            for done in ray.wait(list(waiting), num_returns=1)[0]:
                _take(work, waiting.pop(done), _result(ray, done))


def _take(work: Work, task: _Task, result: _Result) -> None:
    files, error = result
    if error is not None:
        raise LoraMergeError(*error)
    work.spool.receive(files)
    for _ in task[0]:
        work.step()


def _result(ray: Any, reference: Any) -> _Result:
    try:
        result: _Result = ray.get(reference)
    except ray.exceptions.RayError as error:
        raise LoraMergeError(
            f"Ray gave a task up: {str(error).strip().splitlines()[0]}",
            "look at the nodes' memory and logs (`ray status`); --resume goes on with the rest",
        ) from error
    return result


def _run(sent: tuple[Mapping[str, Any], str], modules: Sequence[str], extras: Sequence[str]) -> Any:
    """One task, in a worker process: the files of its results, or what is wrong."""
    import json

    header, folder = sent
    try:
        if Path(folder).is_dir():
            os.chdir(folder)  # references in a recipe are relative to where it is run
        plan = _planned(json.dumps(header, sort_keys=True))
        wanted = set(modules)
        mine = [m for m in plan.alignment.modules if m.name in wanted]
        with tempfile.TemporaryDirectory() as place:
            spool = Spool((Path(place),))
            compute(plan, spool, mine, extras=extras, jobs=1, device="cpu")
            return spool.packed(), None
    except LoraMergeError as error:
        return {}, (error.message, error.remedy)


@lru_cache(maxsize=2)
def _planned(header: str) -> MergePlan:
    """The plan in a worker process, which must be the driver's."""
    import json

    known = validated(Header, json.loads(header), "the driver's plan")
    plan = planned_again(known)
    found = difference(facts_of(plan), known.facts)
    if found:
        raise OutputError(
            f"{os.uname().nodename} does not see what the driver sees: {found}",
            "install the same versions and put the same adapters (`cp -p`) on every node",
        )
    return plan


def _tasks(work: Work, cpus: int) -> Iterator[_Task]:
    """Modules in tasks of about the same work, the largest first; every extra by itself."""
    costs = {module.name: module_bytes(work.plan, module) for module in work.modules}
    enough = sum(costs.values()) / (_TASKS * cpus)
    group: list[str] = []
    for name in sorted(costs, key=lambda one: (-costs[one], one)):
        group.append(name)
        if sum(costs[one] for one in group) >= enough:
            yield tuple(group), ()
            group = []
    if group:
        yield tuple(group), ()
    for name in work.extras:
        yield (), (name,)


def _memory(plan: MergePlan, modules: Sequence[str], largest: float) -> int:
    """Bytes to reserve for a task: modules of a task come one after the other."""
    wanted = set(modules)
    sizes = {m.name: module_bytes(plan, m) for m in plan.alignment.modules if m.name in wanted}
    name = max(sizes, key=sizes.__getitem__, default="")
    needed = _PROCESS + sizes.get(name, 0)
    if largest and needed > largest:
        raise OutputError(
            f"{name} needs about {needed / 1e9:.1f} GB, and no node of the cluster has more than "
            f"{largest / 1e9:.1f} GB for tasks",
            "give the nodes more (ray start --memory), or merge fewer adapters at once",
        )
    return needed


def _ray() -> Any:
    # Nobody has asked for a report of what is merged.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError as error:
        raise LoraMergeError(
            "--engine ray needs Ray", "pip install 'lora-merge[ray]', on every node"
        ) from error
    return ray


@contextmanager
def _connected(ray: Any, address: str | None, jobs: int | None) -> Iterator[None]:
    """A connection to a cluster, unless there is one already."""
    if ray.is_initialized():
        yield
        return
    how = {} if address else {"num_cpus": jobs, "include_dashboard": False}
    try:
        ray.init(address=address, logging_level="ERROR", log_to_driver=False, **how)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise LoraMergeError(
            f"no Ray cluster at {address}: {str(error).splitlines()[0]}",
            "start one (`ray start --head`), or leave --address out",
        ) from error
    try:
        yield
    finally:
        ray.shutdown()
