"""Run a function over many items in several processes."""

import contextlib
import hashlib
import multiprocessing
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

LONGEST = 70  # bytes in the path of temporary files: a socket's may have 107, and its name takes up to 33


def usable_cores() -> int:
    """Processor cores that this process may use, which on a cluster are those of its job."""
    return len(os.sched_getaffinity(0))


def shorten_tempdir() -> None:
    """Let this process and its children reach a TMPDIR with a long path by a link in /tmp: sockets need a short one."""
    long = os.fsencode(tempfile.gettempdir())
    if len(long) <= LONGEST:
        return
    link = Path("/tmp", f"lsdc_utils_{os.getuid()}-{hashlib.sha256(long).hexdigest()[:12]}")
    with contextlib.suppress(OSError):
        link.symlink_to(os.fsdecode(long))
    if os.fsencode(os.path.realpath(link)) == os.path.realpath(long):
        os.environ["TMPDIR"] = tempfile.tempdir = str(link)


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
    shorten_tempdir()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([getattr(function, "func", function).__module__])  # of a partial, what it calls
    with ProcessPoolExecutor(workers, mp_context=context, initializer=begin) as pool:
        yield from pool.map(function, items, chunksize=chunk)
