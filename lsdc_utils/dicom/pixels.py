"""Pixels of DICOM files: where each frame lies in the file, checked by lengths alone, and what its bytes mean.

Native and RLE frames are decoded here. The decoders of the JPEG family are C libraries that a broken file can crash,
hang or fill the memory with; they run in a worker process of their own (`python -m lsdc_utils.dicom.pixels`), which is
started with the first such frame, dies with its parent, and is replaced where it died.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from pydicom import uid
from pydicom.pixels import get_decoder
from rle.rle import decode_frame

from lsdc_utils.dicom.headers import UNDEFINED, DicomError, Header, text, whole

MAX_FRAME = 1 << 24  # pixels: 4096 x 4096, 16 times what a scanner makes
MAX_PIXELS = 1 << 26  # of all frames of a file
MAX_FRAMES = 1 << 12
MAX_FRAGMENTS = 1 << 16
RLE_EXPANDS = 64  # two bytes of RLE become 128 at most

FRAME_SECONDS = 3.0  # of processor time to decode one frame; usual ones take 5 to 30 ms
WAIT_SECONDS = 30.0  # by the clock, on a machine so busy that its decoder hardly runs
START_SECONDS = 60.0  # to start the worker, which takes half a second on an idle machine
DONE, FAILED, EXHAUSTED = 0, 1, 2  # what the worker says of a frame; the last is a flag: replace me
WORKER_MEMORY = 1 << 29  # bytes a worker may take beyond what it needs to start

NATIVE = {"", *uid.UncompressedTransferSyntaxes}  # deflated ones too: their pixels come inflated
JPEG_FAMILY = {
    uid.JPEGBaseline8Bit,
    uid.JPEGExtended12Bit,
    uid.JPEGLossless,
    uid.JPEGLosslessSV1,
    uid.JPEGLSLossless,
    uid.JPEGLSNearLossless,
    uid.JPEG2000Lossless,
    uid.JPEG2000,
}
GREY = {"MONOCHROME1", "MONOCHROME2", ""}
ITEM, SEQUENCE_END = 0xFFFEE000, 0xFFFEE0DD
STARTS = (b"\xff\xd8", b"\xff\x4f")  # the first bytes of a JPEG or JPEG-LS and of a JPEG 2000 image

Fragments = list[tuple[int, int]]  # (offset in the stream, bytes) of the parts of one frame


@dataclass(frozen=True)
class Layout:
    """How the pixels of a file are stored, checked to be possible."""

    syntax: str  # transfer syntax UID
    frames: int
    rows: int
    columns: int
    allocated: int  # bits of a stored pixel: 8, 16 or 32
    stored: int  # bits that mean something
    high: int  # the highest of them
    signed: bool
    inverse: bool  # MONOCHROME1: more is darker

    @property
    def dtype(self) -> np.dtype:
        """Type of a stored pixel, in this machine's byte order."""
        return np.dtype(f"{'i' if self.signed else 'u'}{self.allocated // 8}")

    @property
    def bytes(self) -> int:
        """Size of a decoded frame."""
        return self.rows * self.columns * self.allocated // 8


def read_layout(header: Header) -> Layout:
    """How a file's pixels are stored; DicomError where they are no grey image, or one of an impossible size."""
    dataset = header.dataset
    rows, columns = _dimension(header, "Rows"), _dimension(header, "Columns")
    if header.pixels_at is None:
        raise DicomError("has no pixel data, or a header that is broken before it: copy it again from the archive")
    if header.pixels_vr in ("OF", "OD"):
        raise DicomError("has floating-point pixels, as maps have that were computed from images")
    frames = whole(dataset, "NumberOfFrames")
    frames = 1 if frames is None else frames
    photometric = text(dataset, "PhotometricInterpretation").upper()
    if (whole(dataset, "SamplesPerPixel") or 1) != 1 or photometric not in GREY:
        raise DicomError("is a colour image, such as a report or a screenshot")
    if not 1 <= frames <= MAX_FRAMES or rows * columns > MAX_FRAME or frames * rows * columns > MAX_PIXELS:
        raise DicomError(f"claims {frames} frames of {rows} x {columns} pixels, which no scanner makes")
    allocated = whole(dataset, "BitsAllocated") or 0
    if allocated not in (8, 16, 32):
        raise DicomError(f"has BitsAllocated {allocated}, where an MR image has 8, 16 or 32")
    stored = whole(dataset, "BitsStored")
    stored = stored if stored and 0 < stored <= allocated else allocated
    high = whole(dataset, "HighBit")
    high = high if high is not None and stored - 1 <= high < allocated else stored - 1
    signed = whole(dataset, "PixelRepresentation") == 1
    return Layout(
        header.syntax, frames, rows, columns, allocated, stored, high, signed, inverse=photometric == "MONOCHROME1"
    )


def _dimension(header: Header, name: str) -> int:
    value = whole(header.dataset, name)
    if value is None:
        raise DicomError(f"has no {name}: it holds no image")
    if value < 1:
        raise DicomError(f"has {name} {value}: its image is empty")
    return value


def locate(header: Header, layout: Layout) -> list[Fragments]:
    """Where each frame lies in the stream, without reading pixels; DicomError where some are not there.

    A file that was cut short is told from its lengths: of native pixels from the image's size, of compressed ones from
    the lengths of their fragments.
    """
    if layout.syntax in NATIVE:
        return _locate_native(header, layout)
    if layout.syntax != uid.RLELossless and layout.syntax not in JPEG_FAMILY:
        raise DicomError(f"is compressed in a way that cannot be read here: {uid.UID(layout.syntax).name[:60]!r}")
    if header.pixels_length != UNDEFINED:
        raise DicomError("says that its pixels are compressed, but they are not stored so: export it again")
    fragments, table = _fragments(header)
    frames = _frames(header, layout, fragments, table)
    if layout.syntax == uid.RLELossless:
        for parts in frames:
            if sum(length for _, length in parts) * RLE_EXPANDS < layout.bytes:
                raise DicomError("has RLE pixel data that is too short for its image: copy it again from the archive")
    return frames


def _locate_native(header: Header, layout: Layout) -> list[Fragments]:
    """Frames of uncompressed pixels lie one after the other."""
    if header.pixels_length == UNDEFINED:
        raise DicomError("says that its pixels are not compressed, but they are stored so: export it again")
    there = min(header.pixels_length, header.size - header.pixels_at)
    if there < layout.bytes * layout.frames:
        raise DicomError(_short(f"{there} of {layout.bytes * layout.frames} bytes of pixels"))
    return [[(header.pixels_at + frame * layout.bytes, layout.bytes)] for frame in range(layout.frames)]


def _fragments(header: Header) -> tuple[Fragments, list[int]]:
    """The fragments of compressed pixel data, and the offset table of the frames, mostly empty (PS3.5, A.4)."""
    stream, at = header.stream, header.pixels_at
    found: Fragments = []
    while at + 8 <= header.size:
        stream.seek(at)
        group, element, length = struct.unpack("<HHL", stream.read(8))
        if group << 16 | element == SEQUENCE_END:
            break
        if group << 16 | element != ITEM:
            raise DicomError("has compressed pixel data of broken structure: copy it again from the archive")
        if at + 8 + length > header.size:
            raise DicomError(_short(f"{header.size - at - 8} of {length} bytes of compressed pixels"))
        if len(found) > MAX_FRAGMENTS:
            raise DicomError(f"has pixel data of more than {MAX_FRAGMENTS} pieces")
        found.append((at + 8, length))
        at += 8 + length
    if len(found) < 2:
        raise DicomError("has compressed pixel data without an image in it: copy it again from the archive")
    stream.seek(found[0][0])
    table = np.frombuffer(stream.read(min(found[0][1], 4 * MAX_FRAGMENTS) // 4 * 4), "<u4")
    return found[1:], table.tolist()


def _frames(header: Header, layout: Layout, fragments: Fragments, table: list[int]) -> list[Fragments]:
    """Fragments by frame: all of a single one, one each, by the offset table, or by the marks that start an image."""
    if layout.frames == 1:
        return [fragments]
    if len(fragments) == layout.frames:
        return [[part] for part in fragments]
    first = fragments[0][0]
    if len(table) == layout.frames:
        offsets = set(table)
        starts = [offset - first in offsets for offset, _ in fragments]
    else:
        starts = [_peek(header, offset) in STARTS for offset, _ in fragments]
    frames: list[Fragments] = []
    for part, begins in zip(fragments, starts, strict=True):
        if begins or not frames:
            frames.append([])
        frames[-1].append(part)
    if len(frames) != layout.frames:
        raise DicomError(_short(f"{len(frames)} of {layout.frames} frames"))
    return frames


def _peek(header: Header, offset: int) -> bytes:
    header.stream.seek(offset)
    return header.stream.read(2)


def _short(found: str) -> str:
    return f"is cut short, with {found} there: copy it again from the archive"


def decode(header: Header, layout: Layout, fragments: Fragments) -> np.ndarray:
    """The stored values of one frame, (rows, columns) of `layout.dtype`, more is brighter; DicomError where broken."""
    parts = []
    for offset, length in fragments:
        header.stream.seek(offset)
        parts.append(header.stream.read(length))
    data = parts[0] if len(parts) == 1 else b"".join(parts)
    high = layout.high
    if layout.syntax in NATIVE:
        values = _native(data, layout, header)
    elif layout.syntax == uid.RLELossless:
        values = _unpack_rle(data, layout)
    else:
        values = _worker(os.getpid()).decode(data, layout)
        high = layout.stored - 1  # these decoders move the values down themselves
    above, unused = layout.allocated - 1 - high, layout.allocated - layout.stored
    if unused:  # bits that are no part of the value, whatever they hold
        values <<= above
        values >>= unused  # an arithmetic shift for signed numbers, so that their sign is kept
    if layout.inverse:
        values = ~values if layout.signed else values.dtype.type(2**layout.stored - 1) - values
    return values.reshape(layout.rows, layout.columns)


def _native(data: bytes, layout: Layout, header: Header) -> np.ndarray:
    """Uncompressed values in this machine's byte order."""
    if header.little:
        return np.frombuffer(bytearray(data), layout.dtype.newbyteorder("<")).astype(layout.dtype, copy=False)
    if layout.allocated == 8 and header.pixels_vr == "OW":  # bytes in words, and these are turned round
        if len(data) % 2:
            raise DicomError("is big endian, with an odd number of 8-bit pixels in words: export it again")
        return np.frombuffer(data, ">u2").astype("<u2").view(layout.dtype)
    return np.frombuffer(data, layout.dtype.newbyteorder(">")).astype(layout.dtype)


def _unpack_rle(data: bytes, layout: Layout) -> np.ndarray:
    """RLE values, decoded in Rust: three times as fast as pydicom's own way."""
    try:
        values = decode_frame(data, layout.rows * layout.columns, layout.allocated, "<")
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic of the decoder is no Exception
        raise DicomError(
            f"has RLE pixel data that is broken ({_line(error)}): copy it again from the archive"
        ) from None
    return np.frombuffer(values, layout.dtype.newbyteorder("<")).astype(layout.dtype, copy=False)


def _line(error: BaseException) -> str:
    """An error of another library in one short line: the last, where pydicom lists what its plugins said."""
    return (str(error).strip() or type(error).__name__).splitlines()[-1].strip()[:120]


class Worker:
    """The process that decodes the JPEG family, one frame at a time; started when needed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen | None = None
        self._socket: socket.socket | None = None

    def decode(self, data: bytes, layout: Layout) -> np.ndarray:
        """Values of one compressed frame, of `layout.dtype`; DicomError where it is broken or takes too long."""
        with self._lock:
            try:
                if self._process is None or self._process.poll() is not None:
                    self._start()
                deadline = time.monotonic() + WAIT_SECONDS
                self._socket.settimeout(WAIT_SECONDS)
                self._socket.sendall(json.dumps({"bytes": len(data), **asdict(layout)}).encode() + b"\n" + data)
                answer = self._read(layout.bytes, deadline)
            except TimeoutError:
                self.stop()
                raise DicomError(f"has compressed pixels that took more than {WAIT_SECONDS:g} s to decode") from None
            except OSError:
                if self._stopped_by() == signal.SIGPROF:
                    raise DicomError(
                        f"has compressed pixels that take more than {FRAME_SECONDS:g} s to decode"
                    ) from None
                raise DicomError("has compressed pixels that made the decoder crash") from None
            except DicomError:
                raise
            except BaseException:  # an interrupt leaves half an answer on the way
                self.stop()
                raise
        if isinstance(answer, str):
            raise DicomError(f"has compressed pixels that cannot be decoded ({answer}): copy it again from the archive")
        if len(answer) != layout.bytes:
            raise DicomError("has compressed pixels of another size than its header says")
        return np.frombuffer(answer, layout.dtype)

    def _stopped_by(self) -> int:
        """End the process, and the signal that it had ended by before; 0 where it had not, or by none."""
        process = self._process
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(1)
        ended = process.returncode
        self.stop()
        return -ended if ended is not None and ended < 0 else 0

    def stop(self) -> None:
        """End the process, whatever it is doing."""
        if self._socket is not None:
            self._socket.close()
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._process = self._socket = None

    def _start(self) -> None:
        self.stop()
        self._socket, theirs = socket.socketpair()
        path = [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path), "OPENBLAS_NUM_THREADS": "1"}
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "lsdc_utils.dicom.pixels"],
                stdin=theirs,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=environment,
            )
        try:
            self._read(0, time.monotonic() + START_SECONDS)  # its word that it is ready
        except OSError:
            self.stop()
            raise DicomError(
                "needs a decoder that does not start: does `python -m lsdc_utils.dicom.pixels` wait?"
            ) from None

    def _read(self, limit: int, deadline: float) -> bytearray | str:
        """One answer: the decoded bytes, at most `limit`, or what went wrong."""
        size, state = struct.unpack("<LB", self._receive(5, deadline))
        if size > limit + 4096:
            raise OSError("not an answer")
        answer = self._receive(size, deadline)
        if state & EXHAUSTED:
            self.stop()
        return answer.decode("utf-8", "replace") if state & FAILED else answer

    def _receive(self, size: int, deadline: float) -> bytearray:
        answer = bytearray(size)
        view = memoryview(answer)
        while view:
            self._socket.settimeout(max(deadline - time.monotonic(), 1e-3))
            n = self._socket.recv_into(view)
            if not n:
                raise OSError("the worker has ended")
            view = view[n:]
        return answer


@functools.lru_cache(maxsize=1)
def _worker(process: int) -> Worker:
    """The worker of this process: one that was forked from another must not talk to the other's."""
    return Worker()


def serve() -> None:
    """Decode what comes in at the socket that is the standard input, until it closes: the worker's whole life."""
    import resource  # not on Windows, where nothing else of this module is hindered by its absence

    used = _memory()
    if used:
        resource.setrlimit(resource.RLIMIT_AS, (used + WORKER_MEMORY, used + WORKER_MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    channel = socket.socket(fileno=0)
    requests = channel.makefile("rb")
    channel.sendall(struct.pack("<LB", 0, DONE))
    for line in requests:
        request = json.loads(line)
        data = requests.read(request.pop("bytes"))
        signal.setitimer(signal.ITIMER_PROF, FRAME_SECONDS)  # each ends the process: too much processor time,
        signal.setitimer(signal.ITIMER_REAL, WAIT_SECONDS + 1)  # or the parent gone before it took the answer
        try:
            answer, state = _decode_jpeg(data, Layout(**request)).tobytes(), DONE
        except Exception as error:
            answer, state = _line(error).encode(), FAILED
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        if _memory() > used + WORKER_MEMORY // 2:  # a decoder that fails may keep what it took
            state |= EXHAUSTED
        channel.sendall(struct.pack("<LB", len(answer), state) + answer)


def _memory() -> int:
    """Address space of this process in bytes; 0 where the system does not tell."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGESIZE")
    except OSError:
        return 0


def _decode_jpeg(data: bytes, layout: Layout) -> np.ndarray:
    """Values of a frame of the JPEG family, (rows, columns) of `layout.dtype`; any exception where it is broken."""
    claimed = _claimed_shape(data)
    if claimed != (layout.rows, layout.columns):
        raise ValueError(f"an image of {claimed[0]} x {claimed[1]} pixels")
    data += b"\0" * (len(data) % 2)
    item = struct.Struct("<HHL").pack
    source = item(ITEM >> 16, ITEM & 0xFFFF, 0) + item(ITEM >> 16, ITEM & 0xFFFF, len(data)) + data
    fast = (
        "pyjpegls" if layout.syntax in uid.JPEGLSTransferSyntaxes else "pylibjpeg"
    )  # four times as fast as pylibjpeg's
    values, _ = get_decoder(uid.UID(layout.syntax)).as_array(
        source,
        raw=True,
        decoding_plugin=fast,
        rows=layout.rows,
        columns=layout.columns,
        number_of_frames=1,
        samples_per_pixel=1,
        bits_allocated=layout.allocated,
        bits_stored=layout.stored,
        pixel_representation=int(layout.signed),
        photometric_interpretation="MONOCHROME2",
        pixel_keyword="PixelData",
    )
    return values.astype(layout.dtype)


def _claimed_shape(data: bytes) -> tuple[int, int]:
    """Rows and columns by a compressed image's own header (ISO 10918-1, B.2.2; 14495-1, C.2.2; 15444-1, A.5.1)."""
    if data[:4] == b"\xff\x4f\xff\x51":
        columns, rows, left, top = struct.unpack_from(">4L", data, 8)
        return rows - top, columns - left
    at = 2
    while True:
        mark, length = struct.unpack_from(">HH", data, at)
        if mark == 0xFFF7 or (0xFFC0 <= mark <= 0xFFCF and mark not in (0xFFC4, 0xFFC8, 0xFFCC)):
            return struct.unpack_from(">HH", data, at + 5)
        if mark < 0xFF01 or length < 2:
            raise ValueError("no JPEG image")
        at += 2 + length


if __name__ == "__main__":
    serve()
