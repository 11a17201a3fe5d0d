"""Training of a detector by ultralytics' trainer, resumable from its last checkpoint, and its weights."""

import contextlib
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import yaml

from lsdc_utils.checkpoint import Checkpoint, describe, described, fingerprint
from lsdc_utils.detector.classes import Detector, DetectorConfig, DetectorError, class_table, config_from
from lsdc_utils.files import atomic, sha256

FIXED = {  # settings that `train_detector` makes; None: one for each training
    "task": "detect", "mode": "train", "name": "train", "exist_ok": True, "amp": False, "plots": False, "save": False,
    "data": None, "project": None, "device": None, "imgsz": None, "rect": None, "val": None,
}  # fmt: skip
# Of our own: `start_boxes`, `quicken_norms`, `lean`, `exchange_halves`.
TRICKS = {"box_start": False, "quick_norms": False, "width": 0.0, "exchange": 0.0}


def quiet_ultralytics(folder: str | Path) -> None:
    """Keep ultralytics off the network and out of the home directory; its settings and font go to `folder`. It reads
    these variables when it is first imported, so nothing in this package imports it before this has run."""
    if "ultralytics" in sys.modules:
        return
    os.environ.update(
        YOLO_CONFIG_DIR=str(Path(folder).resolve()),
        YOLO_OFFLINE="True",
        YOLO_AUTOINSTALL="False",
        YOLO_VERBOSE="False",  # the trainer prints a line per epoch
        ULTRALYTICS_SAFE_LOAD="1",  # weights are unpickled through an allow-list only
    )
    import matplotlib

    # Even offline it asks the network for this font, unless the file is here.
    font = Path(folder) / "Ultralytics" / "Arial.ttf"
    font.parent.mkdir(parents=True, exist_ok=True)
    with atomic(font) as temporary:
        shutil.copyfile(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", temporary)
    from ultralytics import settings

    settings.update({"sync": False})


def check_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of a training, unchanged; DetectorError names unknown, fixed and missing ones.

    Keys are those of ultralytics' configuration, and `TRICKS`. `train_detector` itself sets data, image size, device
    and folders, and the precision: 16 bits on a GPU, 32 on a CPU.
    """
    quiet_ultralytics(Path(tempfile.gettempdir()) / f"lsdc_utils_{os.getuid()}")
    from ultralytics.cfg import DEFAULT_CFG_DICT

    names = set(settings)
    for wrong, what in (
        (names - set(DEFAULT_CFG_DICT) - set(TRICKS), "no such setting in ultralytics"),
        (names & set(FIXED), "set by train_detector, leave it out"),
        ({"model", "epochs", "batch", "seed"} - names, "must be given"),
    ):
        if wrong:
            raise DetectorError(f"settings of the training: {', '.join(sorted(wrong))}: {what}")
    if not settings["model"].endswith(".yaml") and not Path(settings["model"]).is_file():  # ultralytics would fetch it
        raise DetectorError(f"yolo_model: there are no pretrained weights {settings['model']} (seen from {Path.cwd()})")
    return settings


def train_detector(
    folder: str | Path, shown: pd.DataFrame, config: DetectorConfig, settings: dict[str, Any],
    work: str | Path, threads: int = 1, held_out: Sequence[str] = (),
) -> tuple[torch.nn.Module, pd.DataFrame]:  # fmt: skip
    """Train YOLO by ultralytics' trainer on images of the data set in `folder`; return the EMA model and its history.

    `shown`: as `training_images` gives it. `settings`: see `check_settings`. `threads`: of torch; another number gives
    slightly different weights. `held_out`: images to validate on after each epoch, which costs as much as training.
    `work`: a folder for ultralytics' files and for the checkpoint of one of the last epochs, from which the same
    training resumes when it is started again; remove it once the weights are saved. The last epoch's weights are
    returned: nothing is chosen on held-out images. history: epoch, seconds, lr, loss parts and mAP if validated.
    """
    check_settings(settings)
    folder, work = Path(folder).resolve(), Path(work).resolve()
    checkpoint = Checkpoint(work, _training_key(folder, shown, config, [settings, threads], held_out))
    trainer = _trainer(folder, shown, config, settings, checkpoint, threads, held_out)
    from lsdc_utils.detector.trainer import Finished

    with contextlib.suppress(Finished):
        trainer.train()
    shutil.rmtree(work / "ultralytics")
    model = trainer.ema.ema.eval().cpu().to(memory_format=torch.contiguous_format)
    return model, pd.DataFrame(trainer.history)


def augmented_batch(
    folder: str | Path, shown: pd.DataFrame, config: DetectorConfig, settings: dict[str, Any], count: int = 8
) -> tuple[np.ndarray, pd.DataFrame]:
    """A batch as the training's own loader gives it: images (n, rows, cols, 3) uint8 and a table of boxes: image (0 to
    n - 1), class_id, x, y, width, height (centre and size as fractions of the image)."""
    check_settings(settings)
    with tempfile.TemporaryDirectory() as work:
        few = settings | {"batch": count, "workers": 0, "cache": False}
        trainer = _trainer(Path(folder).resolve(), shown, config, few, Checkpoint(Path(work).resolve(), ""), 1, ())
        trainer.setup_model()  # whose stride the data set asks for
        batch = next(iter(trainer.get_dataloader(trainer.data["train"], trainer.args.batch)))
    boxes = pd.DataFrame(batch["bboxes"].numpy(), columns=["x", "y", "width", "height"])
    boxes.insert(0, "image", batch["batch_idx"].numpy().astype(int))
    boxes.insert(1, "class_id", batch["cls"].numpy().ravel().astype(int))
    return batch["img"].permute(0, 2, 3, 1).numpy(), boxes


def _trainer(
    folder: Path, shown: pd.DataFrame, config: DetectorConfig, settings: dict[str, Any],
    checkpoint: Checkpoint, threads: int, held_out: Sequence[str],
) -> Any:  # fmt: skip
    """The `DetectorTrainer` of one job, with its data.yaml in a fresh folder of its own."""
    from lsdc_utils.detector.trainer import DetectorTrainer

    work = checkpoint.folder / "ultralytics"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    for name in ("images", "labels"):  # links give each job its own labels.cache: jobs side by side don't share one
        (work / name).symlink_to(folder / name, target_is_directory=True)
    for name, lines in (("train", shown["file"]), ("val", held_out or shown["file"][:1])):
        (work / f"{name}.txt").write_text("\n".join(str(work / line) for line in lines) + "\n")
    data = yaml.safe_load((folder / "data.yaml").read_text()) | {"path": str(work), "train": "train.txt"}
    (work / "data.yaml").write_text(yaml.safe_dump(data | {"val": "val.txt"}))
    weights = dict(zip(shown["file"].map(lambda file: Path(file).name), shown["weight"], strict=True))
    batch = min(settings["batch"], max(int(shown["weight"].sum() + 1e-6), 1))
    box = pd.read_csv(folder / "boxes.csv")[["width", "height"]].median().to_numpy() * config.size[::-1]
    on_gpu = torch.cuda.is_available()
    overrides = {
        "workers": threads,
        "cache": None if on_gpu else "ram",  # each image is decoded once
        "deterministic": on_gpu,  # as our operations on CPU are; asking costs an import of seconds
        "nbs": batch,
        **{key: value for key, value in settings.items() if key not in TRICKS},
        **FIXED,
        "data": str(work / "data.yaml"),
        "project": str(work),
        "device": "0" if on_gpu else "cpu",
        "imgsz": max(config.size),
        "rect": config.size[0] != config.size[1],
        "batch": batch,
        "val": bool(held_out),
    }
    if not settings["model"].endswith(".yaml"):  # under a name without the apostrophes that ultralytics drops
        (work / "start.pt").symlink_to(Path(settings["model"]).resolve())
        overrides["model"] = os.path.relpath(work / "start.pt")
    tricks = {key: settings.get(key, default) for key, default in TRICKS.items()}
    return DetectorTrainer(overrides, weights, tricks, box, threads, checkpoint)


def _training_key(
    folder: Path, shown: pd.DataFrame, config: DetectorConfig, settings: list[Any], held_out: Sequence[str]
) -> str:
    """Fingerprint of a training: settings, boxes, images as they are on disk, versions and the code of the training."""
    files = [folder / file for file in shown["file"]]
    files += [Path(settings[0]["model"])] if not settings[0]["model"].endswith(".yaml") else []
    about = [settings, asdict(config), list(shown["file"]), list(held_out), [*map(sha256, files)]]
    versions = [torch.__version__, version("ultralytics"), torch.cuda.is_available()]
    code = [Path(__file__).with_name(name).read_bytes() for name in ("training.py", "trainer.py")]
    return fingerprint(about, shown["weight"].to_numpy(), (folder / "boxes.csv").read_bytes(), versions, *code)


def save_detector(detector: Detector, path: str | Path) -> None:
    """Write weights that ultralytics' YOLO(path) opens too, and <path>.json beside them; both atomically."""
    path = Path(path)
    detector.model.args = {"task": "detect", "imgsz": max(detector.config.size)}  # the trainer's name its folders
    vars(detector.model).pop("criterion", None)  # as does its loss
    with atomic(path) as temporary, temporary.open("wb") as file:  # a path's name would be among the bytes
        torch.save({"model": detector.model.half(), "date": None, "train_args": {}}, file)
    detector.model.float()
    about = {
        "config": asdict(detector.config),
        "fold": detector.fold,
        "classes": list(detector.model.names.values()),
        **detector.about,
    }
    describe(path, about, "torch", "ultralytics", "numpy")


def load_detector(path: str | Path, classes: Callable[[DetectorConfig], pd.DataFrame] = class_table) -> Detector:
    """Read a detector that `save_detector` wrote; ValueError if weights, JSON and classes do not belong together."""
    about = described(path := Path(path))
    quiet_ultralytics(Path(tempfile.gettempdir()) / f"lsdc_utils_{os.getuid()}")
    from ultralytics.nn.tasks import torch_safe_load

    with contextlib.chdir(path.parent):  # of a path, ultralytics drops apostrophes
        model = torch_safe_load(path.name, safe_only=True)[0]["model"].float().eval()
    model.model[-1].end2end = True  # the head that needs no suppression of doubles, named since the default changed
    model = model.fuse(verbose=False).to("cuda" if torch.cuda.is_available() else "cpu")
    model = model.to(memory_format=torch.channels_last)
    config = config_from(about["config"])
    if about["classes"] != list(classes(config)["name"]):
        raise DetectorError(f"{path}: its classes are not those of this version, or it has the published classes")
    return Detector(model, config, about["fold"], about)
