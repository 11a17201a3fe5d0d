"""Tests of the process that decodes the JPEG family: the reader survives its crashes, hangs and memory errors."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from dicom_files import LOSSLESS_RAMP, RAMP, write_slice
from pydicom import uid

from lsdc_utils.dicom import DicomError, pixels, read_series
from lsdc_utils.dicom.pixels import Layout, Worker

ROOT = Path(pixels.__file__).parents[2]
LAYOUT = Layout(uid.JPEGLosslessSV1, 1, 6, 8, 16, 12, 11, signed=False, inverse=False)


@pytest.fixture
def worker() -> Iterator[Worker]:
    worker = Worker()
    yield worker
    worker.stop()


def test_one_process_decodes_frame_after_frame(worker: Worker) -> None:
    processes = set()
    for _ in range(3):
        assert worker.decode(LOSSLESS_RAMP, LAYOUT).tolist() == RAMP.tolist()
        processes.add(worker._process.pid)
    with pytest.raises(DicomError, match="broken pixel data"):
        worker.decode(LOSSLESS_RAMP[:30], LAYOUT)
    assert worker.decode(LOSSLESS_RAMP, LAYOUT)[-1, -1] == RAMP[-1, -1]
    assert {worker._process.pid} == processes


def test_a_worker_that_died_is_replaced(worker: Worker) -> None:
    worker.decode(LOSSLESS_RAMP, LAYOUT)
    worker._process.send_signal(signal.SIGKILL)
    worker._process.wait()
    assert worker.decode(LOSSLESS_RAMP, LAYOUT).size == RAMP.size


def signal_when_asked(process: subprocess.Popen, monkeypatch: pytest.MonkeyPatch, *signals: signal.Signals) -> None:
    """Send signals to a process when it is next asked whether it lives, which is just before it gets its work."""

    def poll() -> None:
        monkeypatch.undo()
        for number in signals:
            os.kill(process.pid, number)

    monkeypatch.setattr(process, "poll", poll)


def test_a_crash_costs_its_frame_only(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    worker.decode(LOSSLESS_RAMP, LAYOUT)
    worker._process.send_signal(signal.SIGSTOP)
    signal_when_asked(worker._process, monkeypatch, signal.SIGKILL)
    with pytest.raises(DicomError, match="made the decoder crash"):
        worker.decode(LOSSLESS_RAMP, LAYOUT)
    assert worker.decode(LOSSLESS_RAMP, LAYOUT).size == RAMP.size


def test_a_frame_without_end_is_given_up(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    worker.decode(LOSSLESS_RAMP, LAYOUT)
    hanging = worker._process
    hanging.send_signal(signal.SIGSTOP)
    monkeypatch.setattr("lsdc_utils.dicom.pixels.WAIT_SECONDS", 0.2)
    with pytest.raises(DicomError, match=r"more than 0.2 s"):
        worker.decode(LOSSLESS_RAMP, LAYOUT)
    assert hanging.poll() is not None  # nothing is left behind
    monkeypatch.undo()
    assert worker.decode(LOSSLESS_RAMP, LAYOUT).size == RAMP.size


def test_a_frame_may_take_so_much_processor_time_and_no_more(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    worker.decode(LOSSLESS_RAMP, LAYOUT)
    spent = worker._process
    spent.send_signal(signal.SIGSTOP)
    signal_when_asked(spent, monkeypatch, signal.SIGPROF, signal.SIGCONT)
    with pytest.raises(DicomError, match=r"take more than 3 s"):
        worker.decode(LOSSLESS_RAMP, LAYOUT)
    assert worker.decode(LOSSLESS_RAMP, LAYOUT).size == RAMP.size


def test_an_image_larger_than_its_header_says_gets_no_memory(worker: Worker) -> None:
    huge = LOSSLESS_RAMP.replace(bytes.fromhex("00060008"), bytes.fromhex("ffffffff"))
    with pytest.raises(DicomError, match="an image of 65535 x 65535 pixels"):
        worker.decode(huge, LAYOUT)
    big = dataclasses.replace(LAYOUT, rows=65535, columns=65535)  # which the reader would not pass on
    with pytest.raises(DicomError):
        worker.decode(huge, big)
    assert worker.decode(LOSSLESS_RAMP, LAYOUT).size == RAMP.size
    if Path("/proc").is_dir():
        limit = psutil.Process(worker._process.pid).rlimit(psutil.RLIMIT_DATA)[0]
        assert 0 < limit < 1 << 30


def test_a_decoder_that_does_not_start_is_a_reason(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/true")
    with pytest.raises(DicomError, match="decoder that does not start"):
        worker.decode(LOSSLESS_RAMP, LAYOUT)


def test_the_worker_ends_with_its_parent(tmp_path: Path) -> None:
    code = (
        "import os; from lsdc_utils.dicom import pixels, read_series\n"
        f"read_series({str(tmp_path)!r})\n"
        "print(pixels._worker(os.getpid())._process.pid, flush=True); os.kill(os.getpid(), 9)"
    )
    write_slice(tmp_path / "1.dcm", 1, (0.0, 0.0, 0.0), pixels=RAMP, syntax=LAYOUT.syntax, encoded=[LOSSLESS_RAMP])
    child = int(subprocess.run([sys.executable, "-c", code], capture_output=True, cwd=ROOT).stdout)
    deadline = time.monotonic() + 10
    while psutil.pid_exists(child) and psutil.Process(child).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _decode_in_child(folder: Path) -> tuple[int, int]:
    value = int(read_series(folder).pixels[0][-1, -1])
    return value, pixels._worker(os.getpid())._process.pid


@pytest.mark.parametrize("method", ["fork", "forkserver"])
def test_processes_of_a_pool_have_workers_of_their_own(tmp_path: Path, method: str) -> None:
    write_slice(tmp_path / "1.dcm", 1, (0.0, 0.0, 0.0), pixels=RAMP, syntax=LAYOUT.syntax, encoded=[LOSSLESS_RAMP])
    parent = _decode_in_child(tmp_path)
    with multiprocessing.get_context(method).Pool(1) as pool:
        child = pool.apply(_decode_in_child, (tmp_path,))
    assert parent[0] == child[0] == RAMP[-1, -1]
    assert parent[1] != child[1] and _decode_in_child(tmp_path) == parent
