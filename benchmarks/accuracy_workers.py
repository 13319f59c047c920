"""Where the jobs of `edgead.benchmarks.accuracy` run: one after another, or on a Ray cluster.

Each has a process of its own, so that what one leaves behind or dies of does not reach another. A
process that dies is started once more; a job that fails by itself is not, its error says why.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from edgead.benchmarks.accuracy_job import read_outcome, run_job, write_error
from edgead.errors import EdgeADError

ATTEMPTS = 2
OBJECT_STORE_BYTES = 128 << 20  # no job sends anything but the name of its folder


def one_by_one(folders: Sequence[Path], *, threads: int | None = None) -> Iterator[Path]:
    """Run jobs one after another in subprocesses; what they write goes to log.txt in their folders.

    Yields:
        Each folder when its job is finished or has failed.
    """
    command = [sys.executable, "-m", "edgead.benchmarks.accuracy_job"]
    options = [] if threads is None else ["--threads", str(threads)]
    for folder in folders:
        (folder / "error.json").unlink(missing_ok=True)
        for _ in range(ATTEMPTS):
            with (folder / "log.txt").open("ab") as text:
                done = subprocess.run([*command, str(folder), *options], stdout=text, stderr=text)
            if read_outcome(folder):
                break
        else:
            write_error(folder, f"its process died {ATTEMPTS} times, last with status {done.returncode}")
        yield folder


def on_ray(
    folders: Sequence[Path], *, address: str, workers: int | None = None, threads: int | None = None
) -> Iterator[Path]:
    """Run jobs side by side on a Ray cluster; Ray starts one once more if its worker or machine dies.

    The folders and the data have to be seen under the same paths on each machine of the cluster, and the
    same edgead has to be installed there. Each job gets a GPU if the cluster has any.

    Args:
        address: Of a running cluster, or "local" for one on this machine that ends with the jobs.
        workers: Jobs at a time on a local cluster; default: as many as it has GPUs, else one.
        threads: CPU cores of one job; default: its share of the machine.

    Yields:
        Each folder when its job is finished or has failed, in the order in which that happens.

    Raises:
        EdgeADError: Ray is not installed.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would report to its makers
    os.environ.setdefault("RAY_task_oom_retries", str(ATTEMPTS - 1))  # it would try for ever
    try:
        import ray
    except ModuleNotFoundError as error:
        raise EdgeADError('--ray needs Ray: pip install "edgead[ray]"') from error
    per_gpu = 1
    if address == "local":
        threads, per_gpu = _start_local(workers, threads)
    else:
        ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING)
    try:
        gpus = ray.cluster_resources().get("GPU", 0)
        cores = threads or _share(gpus)
        gpu = min(gpus, 1) / per_gpu
        task = ray.remote(num_cpus=cores, num_gpus=gpu, max_calls=1, max_retries=ATTEMPTS - 1)(
            run_job
        )  # max_calls: the process ends with its job
        pending = {task.remote(str(folder.resolve()), cores): folder for folder in folders}
        while pending:
            (done,), _ = ray.wait(list(pending), num_returns=1)
            folder = pending.pop(done)
            try:
                ray.get(done)
            except ray.exceptions.RayError as error:
                # The text may name machines of the cluster; the message goes into tables.
                cause = getattr(error, "cause", None) or error
                write_error(folder, f"on Ray: {type(cause).__name__}", str(error))
            yield folder
    finally:
        ray.shutdown()


def _start_local(workers: int | None, threads: int | None) -> tuple[int, int]:
    """Start a cluster with room for `workers` jobs.

    Returns:
        The cores of one job, and how many jobs share a GPU.
    """
    import ray

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    gpus = _visible_gpus()
    workers = workers or gpus or 1
    threads = threads or max(1, cores // workers)
    ray.init(
        address="local",  # without it an environment variable or a running cluster would be taken
        num_cpus=workers * threads,
        num_gpus=gpus,
        include_dashboard=False,
        object_store_memory=OBJECT_STORE_BYTES,
        log_to_driver=False,
        logging_level=logging.WARNING,
    )
    return threads, -(-workers // max(1, gpus))


def _visible_gpus() -> int:
    import torch

    return torch.cuda.device_count()


def _share(gpus: float) -> int:
    """Cores of a job so that each machine of the cluster is used: all of them, or those of one GPU."""
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"] and "CPU" in node["Resources"]]
    shares = [node["CPU"] // max(1, node.get("GPU", 0)) for node in nodes if not gpus or node.get("GPU")]
    return max(1, int(min(shares, default=1)))
