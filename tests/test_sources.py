"""Where data is looked for, and that nothing is fetched unasked."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from lsdc_utils import sources


@pytest.fixture(autouse=True)
def nowhere(tmp_path, monkeypatch):
    """No mount, no credentials, and a kagglehub that must not be asked."""
    monkeypatch.setattr(sources, "MOUNTS", (tmp_path / "input",))
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in sources.CREDENTIALS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setitem(sys.modules, "kagglehub", SimpleNamespace(competition_download=lambda _: 1 / 0))


def test_a_named_folder_is_taken(tmp_path):
    assert sources.find_data(str(tmp_path)) == (tmp_path, "folder")
    with pytest.raises(sources.DataNotFound, match="no folder"):
        sources.find_data(str(tmp_path / "absent"))


def test_the_mount_is_found(tmp_path):
    (tmp_path / "input" / sources.COMPETITION).mkdir(parents=True)
    assert sources.find_data() == (tmp_path / "input" / sources.COMPETITION, "kaggle")


def test_nothing_is_fetched_unasked_or_without_credentials():
    with pytest.raises(sources.DataNotFound, match="--data DIR"):
        sources.find_data()
    with pytest.raises(sources.DataNotFound, match="credentials"):
        sources.find_data(download=True)


def test_download(tmp_path, monkeypatch):
    monkeypatch.setenv("KAGGLE_KEY", "set")
    monkeypatch.setattr(sys.modules["kagglehub"], "competition_download", lambda name: str(tmp_path / name))
    assert sources.find_data(download=True) == (tmp_path / sources.COMPETITION, "kaggle")
