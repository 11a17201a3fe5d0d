"""Corrupt DICOM files at random and read them: only DicomError may be raised, within 5 s and 1 GiB.

    .venv/bin/python tests/fuzz/run.py 20000            corrupt and read 20,000 files, in two processes
    .venv/bin/python tests/fuzz/run.py 20000 --seed 7   other files
    .venv/bin/python tests/fuzz/run.py --case 123       file 123 alone, kept as case123.dcm, with the outcomes

File k depends on (seed, k) alone, so that a failure can be repeated. Exit code 0 if nothing failed.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS.parent), str(TESTS), str(TESTS / "fuzz")]

import numpy as np  # noqa: E402
import psutil  # noqa: E402
from dicom_files import write_slice  # noqa: E402
from mutate import mutate, seeds  # noqa: E402

from lsdc_utils import dicom  # noqa: E402
from lsdc_utils.dicom import pixels  # noqa: E402

SECONDS = 5.0  # of processor time for one call, the decoding process included: other work on the machine adds nothing
MEMORY = 1 << 30  # bytes of the reader and its decoding process together
HANG = 60.0  # seconds by the clock until a call is given up for good


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=int, nargs="?", default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--case", type=int)
    parser.add_argument("--part", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part is not None:
        print(json.dumps(read_part(range(options.part, options.files, options.processes), options.seed)))
        return 0
    if options.case is not None:
        print(json.dumps(read_part(range(options.case, options.case + 1), options.seed, Path.cwd()), indent=1))
        return 0
    result = run(options.files, options.seed, options.processes)
    print(report(result))
    return bool(result["failures"])


def run(files: int, seed: int = 0, processes: int = 2) -> dict:
    """Read the files in child processes, so that a crash, a hang or a memory blow-up is seen from outside."""
    command = [sys.executable, __file__, str(files), "--seed", str(seed), "--processes", str(processes), "--part"]
    start = time.monotonic()
    # Files, since a full pipe would block the child: the RLE decoder prints each of its panics at length.
    errors = [tempfile.TemporaryFile("w+") for _ in range(processes)]  # noqa: SIM115
    parts = [
        subprocess.Popen([*command, str(part)], stdout=subprocess.PIPE, stderr=stderr, text=True)
        for part, stderr in enumerate(errors)
    ]
    total = {"outcomes": Counter(), "failures": [], "slowest": (0.0, 0), "memory": 0}
    for part, child in enumerate(parts):
        out, _ = child.communicate()
        if child.returncode:
            errors[part].seek(0)
            total["failures"].append(f"process {part} ended with {child.returncode}: {errors[part].read()[-2000:]}")
            continue
        result = json.loads(out.splitlines()[-1])
        total["outcomes"] += Counter(result["outcomes"])
        total["failures"] += result["failures"]
        total["slowest"] = max(total["slowest"], tuple(result["slowest"]))
        total["memory"] = max(total["memory"], result["memory"])
    return total | {"files": files, "seconds": time.monotonic() - start}


def read_part(cases: range, seed: int, keep: Path | None = None) -> dict:
    """Make and read some of the files: outcomes, failures, the slowest call and the peak memory."""
    resource.setrlimit(resource.RLIMIT_AS, (4 * MEMORY, 4 * MEMORY))  # a wild allocation fails, and the machine lives
    warnings.simplefilter("ignore")
    outcomes: Counter[str] = Counter()
    failures, slowest, most = [], (0.0, 0), 0
    with tempfile.TemporaryDirectory() as folder:
        files = seeds(Path(folder))
        good = write_slice(Path(folder) / "good.dcm", 500, (0.0, 0.0, 100.0))
        for case in cases:
            file = (keep or Path(folder)) / f"case{case}.dcm"
            file.write_bytes(mutate(np.random.default_rng([seed, case]), files))
            calls: dict[str, Callable[[], object]] = {
                "tags": lambda file=file: dicom.read_tags(file),
                "headers": lambda file=file: check(dicom.read_series([good, file], pixels=False)),
                "pixels": lambda file=file: check(dicom.read_series([file])),
                "series": lambda file=file: check(dicom.read_series([good, file])),
            }
            for name, call in calls.items():
                outcome, seconds, memory = attempt(call)
                slowest, most = max(slowest, (seconds, case)), max(most, memory)
                outcomes[f"{name}: {outcome.split(':')[0]}"] += 1
                if outcome.startswith("escaped") or seconds > SECONDS or memory > MEMORY:
                    failures.append(f"case {case}, {name}, {seconds:.1f} s, {memory >> 20} MiB: {outcome}")
                if keep:
                    print(f"{name}: {outcome} ({seconds:.3f} s)")
            if not keep:
                file.unlink()
    return {"outcomes": outcomes, "failures": failures, "slowest": slowest, "memory": most}


def attempt(call: Callable[[], object]) -> tuple[str, float, int]:
    """Outcome of a call (read, DicomError, or an error that escaped), its seconds and its peak memory in bytes."""
    faulthandler.dump_traceback_later(HANG, exit=True)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew: what made the file does not count
    start = processor_time()
    try:
        call()
        outcome = "read"
    except dicom.DicomError as error:
        outcome = f"DicomError: {error}"
    except BaseException as error:
        outcome = f"escaped: {type(error).__name__}: {error}"
    seconds = processor_time() - start
    faulthandler.cancel_dump_traceback_later()
    return outcome, seconds, peak_memory()


def processor_time() -> float:
    """Seconds that this process, its decoding process and those before that one have used."""
    worker = pixels._worker(os.getpid())._process
    live = psutil.Process(worker.pid).cpu_times()[:2] if worker and worker.poll() is None else (0.0, 0.0)
    return sum(os.times()[:4]) + sum(live)


def check(series: dicom.Series) -> None:
    """Check a series: finite coordinates, pixels of the stated size, steps above 0."""
    for k, image in enumerate(series.slices):
        assert np.isfinite(image.affine).all() and abs(np.linalg.det(image.affine)) > 0
        assert abs(image.instance_number) < 2**31
        point = series.to_patient(image.instance_number, 1.0, 1.0)
        assert np.isfinite(series.to_pixel(*point)).all()
        if series.pixels is not None:
            assert series.pixels[k].shape == image.shape and np.isfinite(series.pixels[k].max())
    assert (series.steps() > 0).all()
    assert all(reason and "\n" not in reason for _, reason in (*series.skipped, *series.repaired))


def peak_memory() -> int:
    """Peak memory in bytes of this process since its peak was reset, plus that of its decoding process."""
    worker = pixels._worker(os.getpid())._process
    live = peak(worker.pid) if worker and worker.poll() is None else 0
    return peak(os.getpid()) + max(live, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)


def peak(process: int) -> int:
    """The peak of a process's memory in bytes; ru_maxrss would also count what its parent held when it started it."""
    status = Path(f"/proc/{process}/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def report(result: dict) -> str:
    """The lines that the command ends with."""
    lines = [f"{name}: {count}" for name, count in sorted(result["outcomes"].items())]
    seconds, case = result["slowest"]
    lines.append(f"slowest call {seconds:.2f} s (case {case}), most memory {result['memory'] >> 20} MiB")
    lines += [f"FAILED {failure}" for failure in result["failures"][:50]]
    lines.append(f"{result['files']} files in {result['seconds']:.0f} s, {len(result['failures'])} failures")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
