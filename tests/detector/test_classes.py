"""Detectors: what they are shown, and what their classes mean."""

import pytest
from toy_spine import config

from lsdc_utils.detector.classes import DetectorConfig, DetectorError, class_table, config_from
from lsdc_utils.vocabulary import GROUPS, SEVERITIES


@pytest.mark.parametrize("condition", GROUPS)
def test_classes_are_the_severities_in_their_order(condition):
    table = class_table(config(condition))
    assert table["severity"].tolist() == [0, 1, 2]
    assert table["name"].tolist() == [f"{GROUPS[condition].base}_{name}" for name in SEVERITIES]


def test_settings_that_cannot_work_are_refused():
    settings = {"condition": "scs", "window": (200.0, 80.0), "size": (32, 32), "neighbours": True, "box_mm": 14.0}
    assert DetectorConfig(**settings | {"window": None}).window is None
    wrong = ({"size": (60, 32)}, {"window": (200.0,)}, {"window": (200.0, 0.0)}, {"condition": "spine"})
    for value in wrong:
        with pytest.raises(DetectorError):
            DetectorConfig(**settings | value)


def test_a_config_comes_back_from_lists():
    values = {"condition": "ss", "window": [80, 60], "size": [96, 96], "neighbours": True, "box_mm": 10.0}
    assert config_from(values).window == (80, 60) and config_from(values | {"window": []}).window is None
    assert config_from(values | {"window": None}).window is None
    assert config_from(values).views == ((1.0, False),)
    assert config_from(values | {"views": [[1.0, 0], [0.5, 1]]}).views == ((1.0, False), (0.5, True))
    way = [[1.0, -2.0]] * 5
    assert config_from(values | {"canal_from_foramina": way}).canal_from_foramina == ((1.0, -2.0),) * 5
