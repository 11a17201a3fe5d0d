"""The pins of requirements.txt: resolved anew by pip, compared, and written back in the file's own order.

The file has two parts: what the project asks for by name, and what these need in turn. torch's own CUDA and triton
packages belong to a platform and are left out of it.
"""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from packaging.version import Version

from lsdc_utils.files import atomic
from lsdc_utils.pipeline.steps import ROOT

REQUIREMENTS = ROOT / "requirements.txt"
BOUND = re.compile(r"(nvidia-(?!ml-py)|cuda-|triton$)")  # to a platform, through torch
COMMENT = re.compile(r"(?:^#.*\n)+", re.MULTILINE)
PIN = re.compile(r"^([A-Za-z0-9][\w.-]*)==(\S+)$", re.MULTILINE)


class PinError(RuntimeError):
    """pip could not resolve what is asked for; the message is pip's."""


@dataclass(frozen=True)
class Pins:
    """Both parts of the file: name -> version, in its order."""

    asked: dict[str, str]
    needed: dict[str, str]


def read_pins(text: str) -> Pins:
    """The pins in the text of requirements.txt, each part under its comment."""
    asked, needed = (dict(PIN.findall(part)) for part in COMMENT.split(text)[1:])
    return Pins(asked, needed)


def normalised(name: str) -> str:
    """A distribution's name as all spellings of it have it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def imported(source: str) -> set[str]:
    """Top-level names of what Python source imports anywhere, but for Python's own and our package."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        names |= {alias.name for alias in node.names} if isinstance(node, ast.Import) else set()
        names |= {node.module} if isinstance(node, ast.ImportFrom) and not node.level else set()
    return {name.split(".")[0] for name in names} - sys.stdlib_module_names - {"lsdc_utils"}


def resolve(names: list[str]) -> dict[str, str]:
    """The newest versions, by pip, of these distributions and all that they need: name -> version. PinError where pip
    finds none that go together."""
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet", "--report", "-"]
    done = subprocess.run([*command, *names], capture_output=True, text=True)
    if done.returncode:
        raise PinError(done.stderr.strip())
    return versions(json.loads(done.stdout))


def versions(report: dict) -> dict[str, str]:
    """Name -> version of what a report of pip would install, without what is bound to a platform."""
    found = {one["metadata"]["name"]: one["metadata"]["version"].split("+")[0] for one in report["install"]}
    return {name: version for name, version in found.items() if not BOUND.match(normalised(name))}


def renewed(pins: Pins, found: dict[str, str]) -> Pins:
    """The pins at the versions found: the first part as it is, the second with what is needed now, by name."""
    by_name = {normalised(name): (name, version) for name, version in found.items()}
    asked = {name: by_name.pop(normalised(name))[1] for name in pins.asked}
    spelt = {normalised(name): name for name in pins.needed}
    needed = {spelt.get(key, name): version for key, (name, version) in by_name.items()}
    return Pins(asked, dict(sorted(needed.items(), key=lambda pin: pin[0].lower())))


def changes(old: Pins, new: Pins) -> list[str]:
    """A line for each pin that differs: name, versions, and a word where its first number changed."""
    before, after = old.asked | old.needed, new.asked | new.needed
    lines = []
    for name in sorted({*before, *after}, key=str.lower):
        if name not in after:
            lines.append(f"{name:32} {before[name]:>16}    goes")
        elif name not in before:
            lines.append(f"{name:32} {'':>16} -> {after[name]:16} comes")
        elif before[name] != after[name]:
            major = (
                "" if Version(before[name]).release[0] == Version(after[name]).release[0] else "another major version"
            )
            lines.append(f"{name:32} {before[name]:>16} -> {after[name]:16} {major}".rstrip())
    return lines


def rewritten(text: str, pins: Pins) -> str:
    """requirements.txt with other pins under its comments."""
    parts = zip(COMMENT.findall(text), (pins.asked, pins.needed), strict=True)
    return "\n".join(comment + "".join(f"{name}=={v}\n" for name, v in part.items()) for comment, part in parts)


def renew(write: bool, file: Path = REQUIREMENTS) -> str:
    """Resolve the pins anew and say what changes; `write` them to the file."""
    text = file.read_text()
    old = read_pins(text)
    new = renewed(old, resolve(list(old.asked)))
    told = changes(old, new)
    if write and told:
        with atomic(file) as temporary:
            temporary.write_text(rewritten(text, new))
    return "\n".join([*told, f"{len(told)} of {len(old.asked | old.needed)} pins change"])
