"""The archive of a run's models: it grades elsewhere as the run does, says what it is, and is refused when changed."""

from __future__ import annotations

import hashlib
import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT, copy_project, run_all

from lsdc_utils.grading.run_tables import read_recipe
from lsdc_utils.pipeline import pack
from lsdc_utils.pipeline.arguments import UsageError
from lsdc_utils.pipeline.pack import MANIFEST, pack_run, unpack, without_places


@pytest.fixture(scope="module")
def archive(smoke_project: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("archive") / "models.zip"
    pack_run(smoke_project / "outputs/demo", file)
    return file


def test_it_grades_elsewhere_as_the_run_does(smoke_project: Path, tmp_path: Path) -> None:
    data = (
        smoke_project / "outputs" / json.loads((smoke_project / "outputs/demo/data.json").read_text())["data_dir"][3:]
    )
    done = run_all(smoke_project, "pack", "--run", "demo", "--out", str(tmp_path / "models.zip"))
    assert done.returncode == 0 and "models.zip" in done.stdout, done.stderr
    elsewhere = copy_project(tmp_path / "elsewhere")
    done = run_all(
        elsewhere, "predict", str(data), "--run", str(tmp_path / "models.zip"), "--out", str(tmp_path / "graded")
    )
    assert done.returncode == 0, done.stdout + done.stderr
    graded, expected = (pd.read_csv(file) for file in (tmp_path / "graded/submission.csv",
                                                      smoke_project / "outputs/demo/submission.csv"))  # fmt: skip
    assert len(graded) == len(expected) > 0
    pd.testing.assert_frame_equal(graded, expected[graded.columns].set_index("row_id").loc[graded.row_id].reset_index())


def test_the_same_run_gives_the_same_bytes_and_names_no_study_or_place(
    archive: Path, smoke_project: Path, tmp_path: Path
) -> None:
    pack_run(smoke_project / "outputs/demo", tmp_path / "again.zip")
    assert (tmp_path / "again.zip").read_bytes() == archive.read_bytes()
    labels = pd.read_parquet(smoke_project / "outputs/demo/tables/labels.parquet")
    with zipfile.ZipFile(archive) as opened:
        text = {name: opened.read(name).decode() for name in opened.namelist() if not name.endswith((".pt", "tensors"))}
        manifest = json.loads(text[MANIFEST])
        for name, entry in manifest["files"].items():
            assert hashlib.sha256(opened.read(name)).hexdigest() == entry["sha256"]
    for study in labels["study_id"].unique():
        assert not [name for name, content in text.items() if str(study) in content]
    assert not [name for name, content in text.items() if str(smoke_project) in content]
    assert len(json.loads(text["reference.json"])["prior"]) == 25
    names = {name: entry["sha256"] for name, entry in manifest["files"].items() if name.endswith((".pt", "tensors"))}
    assert json.loads(text["blend.json"])["weights"] == {Path(name).stem: digest for name, digest in names.items()}
    [trained_on] = json.loads(text["trained_on.json"])
    assert len(trained_on["hashes"]) >= labels["study_id"].nunique()
    assert len(manifest["columns"]) == 25 and manifest["severities"] == ["normal_mild", "moderate", "severe"]


def test_its_card_states_data_scores_limits_and_licence(archive: Path, smoke_project: Path) -> None:
    scores = json.loads((smoke_project / "outputs/demo/scores.json").read_text())
    with zipfile.ZipFile(archive) as opened:
        card = opened.read("MODEL_CARD.md").decode()
    assert f"{scores['oof']['scores']['ensemble']['total']:.3f}" in card
    low, high = scores["oof"]["interval"]["ensemble"]["total"]
    assert f"{low:.3f} to {high:.3f}" in card
    for word in ("Not for clinical use", "phantom", "AGPL-3.0", "## Limitations", "- Commit: "):
        assert word in card


def test_paths_are_cut_to_their_names() -> None:
    assert without_places({"a": ["/somewhere/x.pt", "x/y", 1], "b": {"c": "/data"}}) == {
        "a": ["x.pt", "x/y", 1],
        "b": {"c": "data"},
    }


def test_packed_models_can_be_packed_again(tmp_path: Path) -> None:
    """Their weights tell the number of studies, not which."""
    assert pack_run(ROOT / "outputs/pretrained", tmp_path / "again.zip")
    with zipfile.ZipFile(tmp_path / "again.zip") as opened:
        own, packed = (json.loads(text) for text in (
            (ROOT / "outputs/pretrained/weights/yolo_scs_fold0.json").read_text(),
            opened.read("weights/yolo_scs_fold0.json"),
        ))  # fmt: skip
    assert packed["studies"] == own["studies"] > 0


def test_a_run_whose_scores_are_with_a_member_that_is_gone_is_not_packed(tmp_path: Path) -> None:
    run = shutil.copytree(ROOT / "outputs/pretrained", tmp_path / "run")
    (run / "blend.json").write_text(json.dumps(json.loads((run / "blend.json").read_text()) | {"members": ["a", "b"]}))
    with pytest.raises(UsageError, match=r"scores of the run in .* are with b, now absent: run it again"):
        pack._contents(run, read_recipe(ROOT / "outputs/pretrained") | {"members": ["a"]})


def test_weights_that_are_not_those_beside_their_record_are_not_packed(tmp_path: Path) -> None:
    run = shutil.copytree(ROOT / "outputs/pretrained", tmp_path / "run")
    with (run / "weights/yolo_ss_fold0.pt").open("ab") as file:
        file.write(b"more")
    with pytest.raises(UsageError, match=r"yolo_ss_fold0\.pt is not the file that its \.json describes"):
        pack_run(run, tmp_path / "models.zip")
    assert not (tmp_path / "models.zip").exists()


def test_the_published_method_is_not_made_ready(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(pack, "read_recipe", lambda _: {"kind": "published", "conditions": ["nfn", "scs", "ss"]})
    with pytest.raises(UsageError, match="no blend to temper"):
        pack.pack_ready(tmp_path, tmp_path / "out", None, 1)


def test_ready_made_models_keep_no_cut_offs_of_rows_that_another_blend_graded(monkeypatch: pytest.MonkeyPatch) -> None:
    run, cut_offs = ROOT / "outputs/pretrained", {"spinal": {"severe": 0.3}}
    monkeypatch.setattr(pack, "reference", lambda *_: {"prior": [], "cut_offs": cut_offs})
    for measured, kept in ((None, cut_offs), ({}, {})):
        contents = pack._contents(run, read_recipe(run), measured)
        assert json.loads(contents["reference.json"]) == {"prior": [], "cut_offs": kept}


# ---- archives that must not be used --------------------------------------------------------------------------------


def rewrite(archive: Path, target: Path, change: Callable[[dict[str, bytes]], None]) -> Path:
    """A copy of an archive whose files `change` changes."""
    with zipfile.ZipFile(archive) as opened:
        contents = {name: opened.read(name) for name in opened.namelist()}
    change(contents)
    with zipfile.ZipFile(target, "w") as made:
        for name, content in contents.items():
            made.writestr(name, content)
    return target


def listed(contents: dict[str, bytes], name: str, content: bytes) -> None:
    """Add a file and its line in the manifest."""
    manifest = json.loads(contents[MANIFEST])
    manifest["files"][name] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    contents |= {name: content, MANIFEST: json.dumps(manifest).encode()}


def changed(contents: dict[str, bytes], **change: object) -> None:
    """Change the manifest."""
    contents[MANIFEST] = json.dumps(json.loads(contents[MANIFEST]) | change).encode()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c.update({"blend.json": c["blend.json"] + b" "}), "blend.json is not the file"),
        (lambda c: c.update({"weights/vit3d_fold0.safetensors": b""}), "vit3d_fold0.safetensors is not the file"),
        (lambda c: c.pop("blend.json"), "differ in 'blend.json'"),
        (lambda c: c.update({"stranger.py": b"1"}), "differ in 'stranger.py'"),
        (lambda c: listed(c, "../../evil.json", b"1"), "'../../evil.json' is not a file name"),
        (lambda c: listed(c, "/tmp/evil.json", b"1"), "'/tmp/evil.json' is not a file name"),
        (lambda c: listed(c, "weights/..json", b"1"), "is not a file name"),
        (lambda c: c.pop(MANIFEST), "has no manifest.json"),
        (lambda c: c.update({MANIFEST: b"{"}), "cannot be read"),
        (lambda c: changed(c, files=[]), "cannot be read"),
        (lambda c: changed(c, files={"blend.json": {"size": "x", "sha256": ""}}), "cannot be read"),
        (lambda c: changed(c, files={n: {"size": -5, "sha256": ""} for n in c if n != MANIFEST}), "is not the file"),
        (lambda c: changed(c, columns=["other"]), "another version"),
        (lambda c: [listed(c, f"weights/x{k}.pt", b"1") for k in range(501)], "for an archive of models"),
    ],
)
def test_a_changed_archive_is_refused(archive: Path, tmp_path: Path, change: Callable, words: str) -> None:
    other = rewrite(archive, tmp_path / "other.zip", change)
    with pytest.raises(UsageError, match=r"other\.zip") as error:
        unpack(other, tmp_path / "models")
    assert words in str(error.value)
    assert not list((tmp_path / "models").glob("**/*.json"))


@pytest.mark.parametrize("size", [0, 100, -200])
def test_a_truncated_archive_is_refused(archive: Path, tmp_path: Path, size: int) -> None:
    (tmp_path / "short.zip").write_bytes(archive.read_bytes()[:size])
    with pytest.raises(UsageError, match=r"short\.zip"):
        unpack(tmp_path / "short.zip", tmp_path / "models")


def test_no_byte_can_change(archive: Path, tmp_path: Path) -> None:
    content, refused = archive.read_bytes(), 0
    for place in np.random.default_rng(0).integers(len(content), size=40):
        (tmp_path / "other.zip").write_bytes(content[:place] + bytes([content[place] ^ 0x55]) + content[place + 1 :])
        try:
            ready = unpack(tmp_path / "other.zip", tmp_path / "models")
        except UsageError:
            refused += 1
        else:  # a byte that means nothing, as in a date
            same = unpack(archive, tmp_path / "models")
            assert all(
                file.read_bytes() == (same / file.relative_to(ready)).read_bytes() for file in ready.rglob("*.*")
            )
    assert refused > 30


def test_it_is_unpacked_once_and_whole(archive: Path, tmp_path: Path) -> None:
    first = unpack(archive, tmp_path / "models")
    (first / "kept").touch()
    assert unpack(archive, tmp_path / "models") == first and (first / "kept").exists()
    assert [path.name for path in (tmp_path / "models").iterdir()] == [first.name]


def test_runs_that_lack_something_and_files_that_are_not_there_are_named(smoke_copy: Path) -> None:
    shutil.rmtree(smoke_copy / "outputs/demo/weights")
    done = run_all(smoke_copy, "pack", "--run", "demo")
    assert done.returncode == 2 and "weights/yolo_nfn_fold0.pt" in done.stderr
    done = run_all(smoke_copy, "predict", "outputs", "--run", "nowhere.zip", "--out", "graded")
    assert done.returncode == 2 and "nowhere.zip: no such file" in done.stderr
