"""No header value but geometry and contrast leaves the files; no process connects beyond this machine."""

from __future__ import annotations

import base64
import gzip
import io
import json
import os
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
from conftest import looks_of, run_all
from PIL import Image, PngImagePlugin
from private import SECRETS, UID_ROOT, WORDS, found_in, leaks
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian


@pytest.fixture(scope="module")
def run(smoke_project: Path) -> Path:
    return smoke_project / "outputs" / "demo"


def test_the_planted_files_hold_what_is_looked_for(run: Path) -> None:
    data = run / json.loads((run / "data.json").read_text())["data_dir"]
    file = next(data.rglob("*.dcm"))
    assert {line.split(": ")[1] for line in found_in(file.name, file.read_bytes(), [*WORDS, UID_ROOT])} == {
        *WORDS,
        UID_ROOT,
    }


def test_every_planted_value_is_looked_for() -> None:
    assert {value.lower() for value in SECRETS.values()} < set(WORDS)


def test_nothing_private_leaves_the_headers(run: Path) -> None:
    assert leaks(run, WORDS) == []


def test_uids_appear_in_exports_alone(run: Path) -> None:
    lines = leaks(run, [UID_ROOT])
    assert any(line.startswith("exports/") for line in lines)
    assert [line for line in lines if not line.startswith("exports/")] == []


def test_validate_prints_nothing_private(smoke_project: Path, run: Path, tmp_path: Path) -> None:
    data = (run / json.loads((run / "data.json").read_text())["data_dir"]).resolve()
    for folder in (data, data / "test_images"):  # with tables, and any folder of DICOM files
        done = run_all(smoke_project, "validate", str(folder), "--out", str(tmp_path / "findings.csv"))
        assert "Traceback" not in done.stderr and (tmp_path / "findings.csv").stat().st_size
        output = (done.stdout + done.stderr).encode()
        assert list(found_in("output", output, [*WORDS, UID_ROOT])) == []
        assert leaks(tmp_path, [*WORDS, UID_ROOT]) == []


# ---- what looks, looks everywhere ----------------------------------------------------------------------------------


def png(word: str) -> bytes:
    info, file = PngImagePlugin.PngInfo(), io.BytesIO()
    info.add_text("Comment", word * 9, zip=True)
    Image.new("L", (8, 8)).save(file, "png", pnginfo=info)
    return file.getvalue()


def dicom(word: str) -> bytes:
    meta, file = FileMetaDataset(), io.BytesIO()
    meta.TransferSyntaxUID, meta.MediaStorageSOPClassUID = ExplicitVRLittleEndian, "1.2.3"
    meta.MediaStorageSOPInstanceUID = "1.2.3.4"
    dataset = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    dataset.SpecificCharacterSet, dataset.PatientComments = "ISO_IR 192", word
    dataset.save_as(file, enforce_file_format=True)
    return file.getvalue()


def notebook(word: str) -> bytes:
    data = {"image/png": base64.b64encode(png(word) + bytes(400)).decode()}
    cell = nbformat.v4.new_code_cell(outputs=[nbformat.v4.new_output("display_data", data)])
    return nbformat.writes(nbformat.v4.new_notebook(cells=[cell])).encode()


def parquet(word: str) -> bytes:
    file = io.BytesIO()
    pd.DataFrame({"a": [word] * 50}).to_parquet(file, compression="gzip")
    return file.getvalue()


def arrays(word: str) -> bytes:
    file = io.BytesIO()
    np.savez_compressed(file, a=np.array([word] * 50))
    return file.getvalue()


def zipped(word: str) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as made:
        made.writestr("a.json", json.dumps([word] * 9))
    return file.getvalue()


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("a.txt", lambda word: f"x {word.upper()} y".encode()),
        ("a.png", png),
        ("a.dcm", dicom),
        ("a.ipynb", notebook),
        ("a.parquet", parquet),
        ("a.zip", zipped),
        ("a.npz", arrays),
        ("a.gz", lambda word: gzip.compress(word.encode() * 9)),
        ("a.pdf", lambda word: b"%PDF stream\n" + zlib.compress(word.encode() * 9) + b"\nendstream"),
        ("a.html", lambda word: b'<img src="data:image/png;base64,' + base64.b64encode(png(word) + bytes(400)) + b'">'),
    ],
)
def test_a_word_is_found_wherever_it_hides(tmp_path: Path, name: str, make) -> None:
    (tmp_path / name).write_bytes(make("other word"))
    assert leaks(tmp_path, WORDS) == []
    (tmp_path / name).write_bytes(make("Zqcomments on a patient"))
    assert f"{name}: zqcomments on a patient" in leaks(tmp_path, WORDS)


# ---- the network ---------------------------------------------------------------------------------------------------


def test_a_whole_run_works_offline(smoke_project: Path) -> None:
    assert looks_of(smoke_project) == []
    watched = (smoke_project / "looks.txt.watched").read_text()
    assert watched.count("ipykernel_launcher") >= len(list((smoke_project / "outputs/demo/notebooks").glob("*.ipynb")))
    for log in (smoke_project / "outputs/demo/logs").glob("*.log"):
        text = log.read_text().lower()
        for word in ("no network in this test", "connectionerror", "name resolution", "offline", "max retries"):
            assert word not in text, log.name


@pytest.mark.parametrize(
    "code",
    [
        "import urllib.request; urllib.request.urlopen('http://example.org')",
        "import socket; socket.create_connection(('192.0.2.1', 80))",
        "import socket; socket.gethostbyname('example.org')",
    ],
)
def test_a_connection_is_refused_and_listed(tmp_path: Path, code: str) -> None:
    watch = {"PYTHONPATH": str(Path(__file__).with_name("watch")), "LSDC_LOOKS": str(tmp_path / "looks.txt")}
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, **watch}, capture_output=True, text=True)
    assert done.returncode == 1 and "no network in this test" in done.stderr
    assert looks_of(tmp_path)
