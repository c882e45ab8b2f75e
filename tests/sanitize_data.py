"""What jobs of tests/sanitize.py need before they run, made by processes of its own: kernels and references."""

from __future__ import annotations

import pickle
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from math import prod
from pathlib import Path

from benchmarks.configs import compiled
from natcore.planning import DeviceFacts
from tests.sanitize_process import Job, data_of


@dataclass(frozen=True)
class Ready:
    """A job whose kernels are in the disk cache, and the file with its data."""

    job: Job
    data: Path


def cost(job: Job) -> int:
    """Of a job's reference, in any unit: the dearest jobs are prepared first."""
    case = job.case
    return prod((case.batch, case.heads, *case.spatial, *case.window.kernel_size))


def make_data(job: Job, file: Path) -> None:
    file.write_bytes(pickle.dumps(data_of(job.case, job.direction, job.dtype)))


def make_kernels(job: Job, device: DeviceFacts) -> None:
    compiled(job.call, job.facts(device), [job.config])


def ready(
    wanted: list[Job], device: DeviceFacts, folder: Path, pool: ProcessPoolExecutor, deadline: float
) -> Iterator[Ready]:
    """The jobs, each as soon as it is ready. Their data are shared by all that differ in nothing but the config."""
    files: dict[tuple, Path] = {}
    parts = {}
    wanted = sorted(wanted, key=cost, reverse=True)
    for job in wanted:
        key = (job.case, job.direction, job.dtype)
        if key not in files:
            files[key] = folder / f"data_{len(files)}"
            parts[pool.submit(make_data, job, files[key])] = key
    waiting: dict[Job, set] = {job: {(job.case, job.direction, job.dtype), job} for job in wanted}
    parts |= {pool.submit(make_kernels, job, device): job for job in wanted}
    try:
        for part in as_completed(parts, max(deadline - time.monotonic(), 0)):
            part.result()
            for job in [job for job, missing in waiting.items() if parts[part] in missing]:
                waiting[job].remove(parts[part])
                if not waiting[job]:
                    del waiting[job]
                    yield Ready(job, files[job.case, job.direction, job.dtype])
    except TimeoutError:
        pool.shutdown(wait=False, cancel_futures=True)
