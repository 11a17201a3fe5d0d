"""Pixels of DICOM files: lengths checked without reading them, frames decoded by pydicom's decoders.

Those of the JPEG family are C libraries that a broken file can crash, hang or fill the memory with: they run in a
process of their own, replaced after a crash. The RLE decoder is called directly: 1.0 ms a slice, not 1.6 ms.
"""

import contextlib
import functools
import os
import resource
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe
from pathlib import Path

import numpy as np
from pydicom import Dataset, uid
from pydicom.encaps import encapsulate, generate_fragments, generate_frames
from pydicom.pixels import get_decoder
from rle.rle import decode_frame

from lsdc_utils.dicom.headers import UNDEFINED, DicomError, Header, broken_file, integer, read_bytes, text

MAX_FRAME = 1 << 24  # pixels: 4096 x 4096, 16 times what a scanner makes
MAX_PIXELS = 1 << 26  # of all frames of a file
MAX_FRAMES = 1 << 12
MAX_FRAGMENTS = 1 << 16
RLE_EXPANDS = 64  # two bytes of RLE become 128 at most

FRAME_SECONDS = 3.0  # of processor time to decode one frame; usual ones take 5 to 30 ms
WAIT_SECONDS = 30.0  # by the clock, for a busy machine
START_SECONDS = 60.0  # to start the worker, which takes half a second on an idle machine
WORKER_MEMORY = 1 << 29  # bytes of data a worker may hold; it starts with 70 MB
DONE, FAILED, EXHAUSTED = 0, 1, 2  # an answer's first byte; exhausted: failed, and may have kept its memory

NATIVE = uid.UncompressedTransferSyntaxes  # deflated ones too: their pixels come inflated
JPEG_FAMILY = {*uid.JPEGTransferSyntaxes, *uid.JPEGLSTransferSyntaxes, *uid.JPEG2000TransferSyntaxes}
TRUNCATED = "is truncated, with {} present: copy it again from the archive"
GREY = {"MONOCHROME1", "MONOCHROME2", ""}
ITEM, SEQUENCE_END = (0xFFFE, 0xE000), (0xFFFE, 0xE0DD)


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
    padding: tuple[int, int] | None = None  # lowest and highest stored value that is no signal
    words: bool = False  # whether 8-bit pixels are stored in 16-bit words, which matters in big endian

    @property
    def dtype(self) -> np.dtype:
        """Type of a stored pixel, in this machine's byte order."""
        return np.dtype(f"{'i' if self.signed else 'u'}{self.allocated // 8}")

    @property
    def bytes(self) -> int:
        """Size of a decoded frame."""
        return self.rows * self.columns * self.allocated // 8


def read_layout(header: Header) -> Layout:
    """How a file's pixels are stored; DicomError where they are not a grey image, or one of an impossible size."""
    dataset = header.dataset
    rows, columns = integer(dataset, "Rows") or 0, integer(dataset, "Columns") or 0
    if rows < 1 or columns < 1:
        raise DicomError(f"has Rows {rows} and Columns {columns}: it holds no image")
    if header.pixels_at is None:
        raise DicomError("has no integer pixels, or a header broken before them: copy it again from the archive")
    frames = 1 if (claimed := integer(dataset, "NumberOfFrames")) is None else claimed
    photometric = text(dataset, "PhotometricInterpretation").upper()
    if (integer(dataset, "SamplesPerPixel") or 1) != 1 or photometric not in GREY:
        raise DicomError("is a colour image, such as a report or a screenshot")
    if not 1 <= frames <= MAX_FRAMES or rows * columns > MAX_FRAME or frames * rows * columns > MAX_PIXELS:
        raise DicomError(f"claims {frames} frames of {rows} x {columns} pixels, which no scanner makes")
    allocated = integer(dataset, "BitsAllocated") or 0
    if allocated not in (8, 16, 32):
        raise DicomError(f"has BitsAllocated {allocated}, where an MR image has 8, 16 or 32")
    stored = integer(dataset, "BitsStored")
    stored = stored if stored and 0 < stored <= allocated else allocated
    high = integer(dataset, "HighBit")
    high = high if high is not None and stored - 1 <= high < allocated else stored - 1
    signed, words = integer(dataset, "PixelRepresentation") == 1, header.pixels_vr == "OW"
    inverse, padding = photometric == "MONOCHROME1", _padding(dataset, signed)
    return Layout(header.syntax, frames, rows, columns, allocated, stored, high, signed, inverse, padding, words)


def _padding(dataset: Dataset, signed: bool) -> tuple[int, int] | None:
    """Lowest and highest stored value of padding (PS3.3, C.7.5.1.1.2), signed like the pixels; None where not given."""
    value, limit = integer(dataset, "PixelPaddingValue"), integer(dataset, "PixelPaddingRangeLimit")
    if value is None:
        return None
    ends = [value, value if limit is None else limit]
    ends = [n - (1 << 16) * (n >> 15 == 1) if signed else n + (1 << 16) * (n < 0) for n in ends]  # another sign's VR
    return min(ends), max(ends)


def check_lengths(header: Header, layout: Layout) -> None:
    """Check by its lengths, without reading pixels, that a file holds them all; DicomError where it does not."""
    native = layout.syntax in NATIVE
    if not native and layout.syntax != uid.RLELossless and layout.syntax not in JPEG_FAMILY:
        raise DicomError(f"has a compression that cannot be read here: {uid.UID(layout.syntax).name[:60]!r}")
    if native == (header.pixels_length == UNDEFINED):
        claim, fact = ("not compressed", "are") if native else ("compressed", "are not")
        raise DicomError(f"has a header that says its pixels are {claim}, but they {fact}: export it again")
    if native:
        there, expected = min(header.pixels_length, header.size - header.pixels_at), layout.bytes * layout.frames
        if there < expected:
            raise DicomError(TRUNCATED.format(f"{there} of {expected} bytes of pixels"))
        return
    at, lengths = header.pixels_at, []  # of the offset table and of each fragment (PS3.5, A.4)
    while at + 8 <= header.size:
        group, element, length = struct.unpack("<HHL", read_bytes(header, at, 8))
        if (group, element) == SEQUENCE_END:
            break
        if (group, element) != ITEM or (not lengths and length > 4 * MAX_FRAMES):
            raise DicomError("has compressed pixel data of broken structure: copy it again from the archive")
        at += 8
        if at + length > header.size:
            raise DicomError(TRUNCATED.format(f"{header.size - at} of {length} bytes of compressed pixels"))
        if len(lengths) > MAX_FRAGMENTS:
            raise DicomError(f"has pixel data of more than {MAX_FRAGMENTS} pieces")
        lengths.append(length)
        at += length
    if len(lengths) < 2:
        raise DicomError("has compressed pixel data without an image in it: copy it again from the archive")
    if len(lengths) - 1 < layout.frames:
        raise DicomError(TRUNCATED.format(f"{len(lengths) - 1} of {layout.frames} frames"))
    if layout.syntax == uid.RLELossless and sum(lengths[1:]) * RLE_EXPANDS < layout.bytes * layout.frames:
        raise DicomError("has RLE pixel data that is too short for its image: copy it again from the archive")


def read_frames(header: Header, layout: Layout) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
    """Stored values (rows, columns) of each frame, and where they are padding (None: nowhere); DicomError if broken."""
    frames = _stored_frames(header, layout)
    decoder, top = decode, layout.high
    if layout.syntax in JPEG_FAMILY:  # whose decoders move the values down
        decoder, top = _worker(os.getpid()).decode, layout.stored - 1
    unused, room = layout.allocated - layout.stored, 1 << (layout.stored - layout.signed)
    for number in range(layout.frames):
        with broken_file("broken pixel data"):
            data = next(frames, None)
        if data is None:
            raise DicomError(TRUNCATED.format(f"{number} of {layout.frames} frames"))
        raw, padded = decoder(data, layout), None
        values = raw if layout.padding is None else raw.copy()
        if unused:  # bits, cleared wherever they are; an arithmetic shift keeps the sign of signed numbers
            values <<= layout.allocated - 1 - top
            values >>= unused
        if layout.padding is not None:  # sought in `raw` if it needs more bits than are stored
            low, high = layout.padding
            seen = values if -room * layout.signed <= low and high < room else raw
            padded = (seen >= low) & (seen <= high)
        yield values, padded


def _stored_frames(header: Header, layout: Layout) -> Iterator[bytes]:
    """The bytes of each frame: native ones lie one after the other, compressed ones in one or more fragments each."""
    header.stream.seek(header.pixels_at)
    if layout.syntax in NATIVE:
        for number in range(layout.frames):
            yield read_bytes(header, header.pixels_at + number * layout.bytes, layout.bytes)
    elif layout.frames > 1:
        yield from generate_frames(header.stream, number_of_frames=layout.frames)
    else:  # all fragments, whatever the offset table says
        _, *fragments = generate_fragments(header.stream)
        yield b"".join(fragments)


def decode(data: bytes, layout: Layout) -> np.ndarray:
    """The values of one frame, (rows, columns) of `layout.dtype`; DicomError where it is broken."""
    shape, plugin = (layout.rows, layout.columns), ""
    if layout.syntax == uid.RLELossless:
        with broken_file("broken pixel data"):
            content = decode_frame(data, layout.rows * layout.columns, layout.allocated, "<")
        return np.frombuffer(content, layout.dtype.newbyteorder("<")).astype(layout.dtype, copy=False).reshape(shape)
    if layout.syntax in JPEG_FAMILY:
        with broken_file("broken pixel data"):
            claimed = _claimed_shape(data)
        if claimed != shape:
            raise DicomError(f"has an image of {claimed[0]} x {claimed[1]} pixels where its header says otherwise")
        data = encapsulate([data], has_bot=False)
        plugin = "pyjpegls" if layout.syntax in uid.JPEGLSTransferSyntaxes else "pylibjpeg"  # four times as fast
    how = dict(raw=True, correct_unused_bits=False, decoding_plugin=plugin)  # `read_frames` corrects them
    size = dict(rows=layout.rows, columns=layout.columns, number_of_frames=1, samples_per_pixel=1)
    bits = dict(bits_allocated=layout.allocated, bits_stored=layout.stored, pixel_representation=int(layout.signed))
    vr = "OW" if layout.words else "OB"
    kind = dict(photometric_interpretation="MONOCHROME2", pixel_keyword="PixelData", pixel_vr=vr)
    with broken_file("broken pixel data"):
        values, _ = get_decoder(uid.UID(layout.syntax)).as_array(data, **how, **size, **bits, **kind)
    return values.astype(layout.dtype, copy=False)


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


class Worker:
    """The process that decodes the JPEG family, one frame at a time; started when needed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen | None = None

    def decode(self, data: bytes, layout: Layout) -> np.ndarray:
        """Values of one compressed frame, (rows, columns); DicomError where it is broken or takes too long."""
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                self._start()
            start = time.monotonic()
            try:
                state, content = self._ask((data, layout), layout.bytes, WAIT_SECONDS)
            except (OSError, EOFError):
                reason, waited = "made the decoder crash", time.monotonic() - start
                if self.stop() == -signal.SIGPROF:
                    reason = f"take more than {FRAME_SECONDS:g} s to decode"
                elif waited >= WAIT_SECONDS:
                    reason = f"took more than {WAIT_SECONDS:g} s to decode"
                raise DicomError(f"has compressed pixels that {reason}") from None
            except BaseException:  # an interrupt leaves half an answer in the pipe
                self.stop()
                raise
            if state == EXHAUSTED:
                self.stop()
        if state != DONE:
            raise DicomError(content.decode("utf-8", "replace"))
        return np.frombuffer(content, layout.dtype).reshape(layout.rows, layout.columns)

    def _start(self) -> None:
        self.stop()
        path = os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])])
        variables = {**os.environ, "PYTHONPATH": path, "OPENBLAS_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "lsdc_utils.dicom.pixels"]
        self._pipe, end = Pipe()
        with end:
            pipes = dict(stdin=end, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            self._process = subprocess.Popen(command, env=variables, **pipes)
        try:
            self._ask(None, 0, START_SECONDS)  # it answers once when it is ready
        except (OSError, EOFError):
            self.stop()
            reason = "needs a decoder that does not start: run `python -m lsdc_utils.dicom.pixels` to see why"
            raise DicomError(reason) from None

    def _ask(self, frame: tuple[bytes, Layout] | None, limit: int, seconds: float) -> tuple[int, bytearray]:
        """State and content of an answer; OSError or EOFError where none comes within `seconds`, which kill."""
        watchdog = threading.Timer(seconds, self._process.kill)
        watchdog.start()
        try:
            if frame:
                self._pipe.send(frame)
            answer = self._pipe.recv_bytes(limit + 4096)
        finally:
            watchdog.cancel()
        return answer[0], bytearray(memoryview(answer)[1:])

    def stop(self) -> int:
        """End the process, whatever it is doing; its return code."""
        process, self._process = self._process, None
        if process is None:
            return 0
        process.kill()
        self._pipe.close()
        return process.wait()


@functools.lru_cache(maxsize=1)
def _worker(process: int) -> Worker:
    """The worker of this process: one that was forked from another must not use the other's."""
    return Worker()


def serve(pipe: Connection) -> None:
    """Decode what comes through the pipe until it closes: the worker's whole life."""
    resource.setrlimit(resource.RLIMIT_DATA, (WORKER_MEMORY, WORKER_MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sizes = Path("/proc/self/statm")  # not every system has it
    pipe.send_bytes(bytes([DONE]))
    while True:
        frame = pipe.recv()
        signal.setitimer(signal.ITIMER_PROF, FRAME_SECONDS)  # ends the process
        try:
            content, state = decode(*frame).tobytes(), DONE
        except DicomError as error:
            held = int(sizes.read_text().split()[5]) * resource.getpagesize() if sizes.exists() else 0
            content, state = str(error).encode(), EXHAUSTED if held > WORKER_MEMORY // 2 else FAILED
        signal.setitimer(signal.ITIMER_PROF, 0)
        pipe.send_bytes(bytes([state]) + content)


if __name__ == "__main__":
    with contextlib.suppress(EOFError, ConnectionError):  # the parent has ended
        serve(Connection(0))
