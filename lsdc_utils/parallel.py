"""Run a function over many items in several processes."""

import multiprocessing
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

LONGEST = 70  # bytes in a path of temporary files: that of a socket in it may have 107


def usable_cores() -> int:
    """Processor cores that this process may use, which on a cluster are those of its job."""
    return len(os.sched_getaffinity(0))


def each(
    function: Callable, items: Sequence, workers: int, few: int, chunk: int = 1, begin: Callable | None = None
) -> Iterator[Any]:
    """The results of `function` for every item, in the order of the items.

    `workers` processes share the items where there are at least `few`; fewer are done sooner than processes start. A
    process takes `chunk` items at a time and calls `begin` first. With several workers a script needs Python's
    `if __name__ == "__main__"`.
    """
    if workers <= 1 or len(items) < few:
        yield from map(function, items)
        return
    # Not forked from here, since a notebook's kernel has threads that a forked process would inherit in any state, but
    # from a server that has imported the function's module once for all.
    if len(os.fsencode(tempfile.gettempdir())) > LONGEST:
        tempfile.tempdir = "/tmp"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([getattr(function, "func", function).__module__])  # of a partial, what it calls
    with ProcessPoolExecutor(workers, mp_context=context, initializer=begin) as pool:
        yield from pool.map(function, items, chunksize=chunk)
