"""OpenMM platforms, and threads that stay on one core each.

OpenMM's CPU platform hands every evaluation to a thread of its own. For small molecules the time goes into waking that
thread, which is several times quicker when it shares a core with its caller. So each Context of the CPU platform gets
one thread, and it and the Python thread that calls it are pinned to one core.
"""

from __future__ import annotations

import os
import queue
import signal
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import cache
from threading import Event
from typing import Any

import openmm

PREFERENCE = ("CUDA", "HIP", "OpenCL", "CPU", "Reference")
PRECISIONS = ("single", "mixed", "double")


def available_platforms() -> tuple[str, ...]:
    """Names of the platforms that this OpenMM has loaded (a GPU platform may still find no device)."""
    return tuple(openmm.Platform.getPlatform(i).getName() for i in range(openmm.Platform.getNumPlatforms()))


def choose_platform(
    name: Any = None, precision: str | None = None, device_index: Any = None
) -> tuple[openmm.Platform, dict[str, str]]:
    """A platform and the properties for its Contexts.

    Args:
        name: None for the first that works of CUDA, HIP, OpenCL, CPU and Reference; or a name (upper or lower case) or
            an `openmm.Platform`.
        precision: "single", "mixed" or "double", where the platform has a choice (GPUs; "mixed" by default). The CPU
            platform always computes in single and Reference in double precision.
        device_index: GPU number(s) like 0 or "0,1", where the platform has devices.

    Returns:
        The platform and its properties. The CPU platform gets one thread for each Context: see the module's docstring.

    Raises:
        ValueError: unknown precision; a platform that is not there or has no working device, with what there is.
    """
    if precision is not None and precision not in PRECISIONS:
        raise ValueError(f"unknown precision {precision!r}; choose from {', '.join(PRECISIONS)}")
    if name is None:
        names = [known for known in PREFERENCE if known in available_platforms()]
    else:
        wanted = name.getName() if isinstance(name, openmm.Platform) else str(name)
        names = [known for known in available_platforms() if known.lower() == wanted.lower()]
        if not names:
            raise ValueError(f"no OpenMM platform {wanted!r} here; available are {', '.join(available_platforms())}")
    problems = []
    for known in names:
        platform = openmm.Platform.getPlatformByName(known)
        properties = _properties(platform, precision, device_index)
        problem = _try(known, tuple(sorted(properties.items())))
        if problem is None:
            return platform, properties
        problems.append(f"{known}: {problem}")
    raise ValueError(
        f"no working OpenMM platform ({'; '.join(problems)}); installed: {', '.join(available_platforms())}"
    )


def is_gpu(platform: openmm.Platform) -> bool:
    """Whether the platform runs on devices with a number of their own."""
    return "DeviceIndex" in platform.getPropertyNames()


def n_cores() -> int:
    """Number of cores that this process may use."""
    return len(_cores())


class PinnedThreads:
    """A few threads, each on its own core as far as there are enough, that share out a list of jobs.

    The first is on the core of the caller. Threads live until `close`, or until this is garbage-collected; idle ones
    do not keep the interpreter from ending.
    """

    def __init__(self, n: int, pin: bool = True) -> None:
        cores = sorted(_cores())
        first = cores.index(_current_core()) if pin else 0
        self._executors = [
            ThreadPoolExecutor(1, "openmm-tsf", _pin, (cores[(first + i) % len(cores)] if pin else None,))
            for i in range(n)
        ]
        with _no_interrupt():  # so that Ctrl-C comes to the caller, and finds every thread whole
            wait([executor.submit(int) for executor in self._executors])

    def __len__(self) -> int:
        return len(self._executors)

    def share(self, work: Callable[[int, Any, Event], None], jobs: Iterable[Any], n: int | None = None) -> None:
        """Call work(thread number, job, stop) once for each job, in any order, on at most n threads.

        An exception in one job stops the others before their next job, and is raised here. So does Ctrl-C; `stop` is
        set then, so that long jobs may look at it and return early.
        """
        todo: queue.SimpleQueue = queue.SimpleQueue()
        for job in jobs:
            todo.put(job)
        stop = Event()

        def serve(index: int) -> None:
            try:
                while not stop.is_set():
                    work(index, todo.get_nowait(), stop)
            except queue.Empty:
                return
            except BaseException:
                stop.set()
                raise

        futures = []
        try:
            for index, executor in enumerate(self._executors[:n]):
                futures.append(executor.submit(serve, index))
            wait(futures)
        finally:
            stop.set()
            wait(futures)
        for future in futures:
            future.result()

    def close(self) -> None:
        """End the threads once they are idle."""
        for executor in self._executors:
            executor.shutdown(wait=True)


@contextmanager
def on_one_core() -> Iterator[None]:
    """Keep the calling thread, and the threads of Contexts that are made in the block, on one core.

    For programs that step Contexts of the CPU platform one at a time, with `Threads` 1, as openmmtools does: several
    times as fast for small molecules. Does nothing where the operating system cannot (only Linux can).
    """
    before = _cores()
    _pin(_current_core())
    try:
        yield
    finally:
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, before)


@contextmanager
def _no_interrupt() -> Iterator[None]:
    """Put off Ctrl-C until the end of the block; threads that start in it never get it."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)


def _cores() -> set[int]:
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def _current_core() -> int:
    # The scheduler has put this thread where there was room: with several programs at work that is a better choice
    # than the first core for everybody. Field 39 of stat(5); the name in field 2 may hold spaces.
    cores = _cores()
    try:
        with open("/proc/thread-self/stat") as file:
            core = int(file.read().rsplit(")", 1)[1].split()[36])
    except (OSError, ValueError, IndexError):
        return min(cores)
    return core if core in cores else min(cores)


def _pin(core: int | None) -> None:
    if core is not None and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {core})


def _properties(platform: openmm.Platform, precision: str | None, device_index: Any) -> dict[str, str]:
    wanted = {"Threads": "1", "Precision": precision or "mixed", "DeviceIndex": device_index}
    names = platform.getPropertyNames()
    return {key: str(value) for key, value in wanted.items() if key in names and value is not None}


@cache
def _try(name: str, properties: tuple[tuple[str, str], ...]) -> str | None:
    """What goes wrong with a Context of one particle, in one line; None if it works."""
    system = openmm.System()
    system.addParticle(1.0)
    platform = openmm.Platform.getPlatformByName(name)
    try:
        openmm.Context(system, openmm.VerletIntegrator(0.001), platform, dict(properties))
    except openmm.OpenMMException as error:
        return " ".join(str(error).split())
    return None
