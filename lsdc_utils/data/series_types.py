"""What the header of an image says its series is: plane, contrast, and why it is not one that is graded."""

import re
import unicodedata
from contextlib import suppress
from pathlib import Path

import numpy as np
import yaml

from lsdc_utils import geometry
from lsdc_utils import vocabulary as words
from lsdc_utils.dicom import Tags

SKIP_WORDS = yaml.safe_load(Path(__file__).with_name("skip_words.yml").read_text())  # reasons to skip an image
CONTRAST_WORDS = {words.T1: r"t1(?!\d)|\bt 1 ?w", words.T2: r"t2(?!\d)|\bt 2 ?w|stir|tirm|spair"}
SHORT = {words.T1: "T1", words.T2: "T2"}
UNKNOWN_CONTRAST = "the header does not say T1 or T2"


def plane_of(tags: Tags) -> str:
    """sagittal, coronal or axial; '' without an orientation."""
    return geometry.plane_of(np.cross(tags.orientation[:3], tags.orientation[3:])) if tags.orientation else ""


def skip_reason(tags: Tags, described: bool = True) -> str:
    """Why an image cannot be of a graded series, '' if it can, by its header (`described`: and its series' words)."""
    if tags.modality not in ("", "MR"):
        return "modality other than MR"
    if not tags.rows and not tags.has_pixels:
        return "no images"
    kinds = [word.lower().replace("_", " ") for word in (*tags.image_type[2:], *tags.sequence)]
    kinds += ["localizer"] * ("LOCALIZER" in tags.image_type[:2])  # where other words do not belong
    for reason, pattern in SKIP_WORDS["image_type"].items():
        if any(re.fullmatch(pattern, kind) for kind in kinds):
            return reason
    if not described:
        return ""
    for reason, pattern in SKIP_WORDS["description"].items():
        if re.search(pattern, _plain(tags.description)):
            return reason
    return "other part of the spine or body" if (regions(tags) or ["lumbar"])[0] == "other" else ""


def regions(tags: Tags) -> list[str]:
    """lumbar and other, in the order in which the description names such parts of the body, or else the body part."""
    for text in (_plain(tags.description), _plain(tags.body_part)):
        found = {name: re.search(pattern, text) for name, pattern in SKIP_WORDS["region"].items()}
        if names := [name for name in found if found[name]]:
            return sorted(names, key=lambda name: found[name].start())
    return []


def contrast_of(tags: Tags) -> tuple[str | None, str]:
    """T1 or T2 (vocabulary) by times (ms) that leave no doubt in spin echoes, else by description; or None, and why."""
    echo, repetition, inversion = (time or 0 for time in (tags.echo_time, tags.repetition_time, tags.inversion_time))
    gradient_echo = {"GR", "GRADIENT"} & {*tags.sequence} and "SE" not in tags.sequence  # GRADIENT: of enhanced images
    if not gradient_echo:
        stir = 80 <= inversion <= 300  # fat is nulled
        if not stir and 0 < echo < 40 and (400 <= inversion < 1500 or 0 < repetition < 1200):  # T1 FLAIR or T1
            return words.T1, ""
        if stir or (echo >= 60 and not 0 < repetition < 1200):
            return words.T2, ""
    if contrast := named_contrast(tags):
        return contrast, ""
    if gradient_echo:
        return None, "gradient echo that names neither T1 nor T2"
    proton = re.search(r"\b(pd|pdw|proton)\b", _plain(tags.description))
    short_echo = 0 < echo < 60 and repetition >= 1500 and "IR" not in tags.sequence and not inversion
    return None, "proton density" if proton or short_echo else UNKNOWN_CONTRAST


def named_contrast(tags: Tags) -> str | None:
    """T1 or T2 if the description, or the contrast of an enhanced image, names only one of them."""
    text = " ".join([_plain(tags.description), *({"T1", "T2", "STIR"} & {*tags.sequence})]).lower()
    named = [contrast for contrast, pattern in CONTRAST_WORDS.items() if re.search(pattern, text)]
    return named[0] if len(named) == 1 else None


def _plain(text: str) -> str:
    """Lower case without accents, words separated by blanks."""
    with suppress(UnicodeError):  # UTF-8 that was read as Latin-1
        text = text.encode("latin-1").decode()
    text = unicodedata.normalize("NFKD", text.lower()).encode("ascii", "ignore").decode()
    return re.sub(r"[^a-z0-9*]+", " ", text).strip()
