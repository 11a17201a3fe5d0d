"""Rehearse a run on the real data set without the data: `python tests/proofs/rehearsal.py [--help]`.

1. Tables of as many phantom studies as the real data set has are written, read, checked and cut into folds.
2. Phantom studies at the pixel sizes of scanners go through 00 to 02 of profile kaggle, and 04's crops are cut, at
   several counts of studies. Time, memory and disk at full size are extrapolated from the two largest counts; what the
   same rule expects from smaller ones is shown beside what was measured.
3. One fold of profile kaggle is run to the report at two epochs: on a CPU at the smallest sizes; --full keeps the
   profile's sizes. KEY=VALUE changes any parameter.

All files lie in a temporary folder, which is removed at the end, and at every stop but a kill.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from conftest import copy_project, run_all  # noqa: E402

from lsdc_utils import costs, phantom  # noqa: E402
from lsdc_utils.data import checks, competition  # noqa: E402
from lsdc_utils.data.folds import make_folds, training_labels  # noqa: E402
from lsdc_utils.data.stacks import load_study  # noqa: E402
from lsdc_utils.detector.dataset import training_images  # noqa: E402
from lsdc_utils.parallel import usable_cores  # noqa: E402
from lsdc_utils.pipeline.graph import read_parameters  # noqa: E402
from lsdc_utils.vit.inputs import crop_centres, study_inputs  # noqa: E402
from lsdc_utils.vit.model import VitConfig  # noqa: E402
from lsdc_utils.vocabulary import GROUPS  # noqa: E402

STUDIES, SLICES = 1975, 147_218  # of the real data set
SPARE = 40e9  # bytes of disk that stay free
A_STUDY = 120e6  # bytes that one study takes at most: files, 8-bit slices, detectors' images, crops
DAYS = 10 * 86400  # seconds after which a run is given up
EPOCHS = ["yolo_epochs={nfn: 2, scs: 2, ss: 2}", "vit_epochs=2", "localiser_batches=100"]
MEMBERS = [  # the smallest of each of the profile's families, from random weights
    {"name": "convnext", "encoder": "convnext_atto"},
    {"name": "efficientnet", "encoder": "tf_efficientnetv2_b0"},
    {"name": "coatnet", "encoder": "coatnet_pico_rw_224"},
    {"name": "maxvit", "encoder": "maxvit_pico_rw_256"},
    {"name": "vit", "encoder": "vit_tiny_patch16_224"},
    {"name": "convnextgru", "encoder": "convnext_atto", "head": "softmax", "pooling": "gru", "seed": 53},
]
SMALLEST = [  # sizes for a CPU
    "yolo_model=yolov10n.yaml",
    "yolo_size={nfn: [64, 64], scs: [64, 64], ss: [64, 64]}",
    "localiser_widths=12,24,32,48",
    "localiser_batch=8",
    f"vit_members={json.dumps(MEMBERS)}",
    "vit_encoder_weights=",
    "vit_size=64",
    "vit_spacing=0.6,0.8,0.5",
    "vit_margin=27",
    "vit_slices=3",
    "vit_wider=[[2.0, 1]]",
    "vit_views=2",
    "vit_width=96",
    "workers=2",
    "threads=1",
]
ASSUMED = (
    "The phantom's studies have as many slices, and pixels of the sizes, as its protocol draws; see slices a study.",
    "Time, memory and disk grow along a line with the number of slices, crops with that of studies.",
    "Memory of the crops is without the pages of their file, which the system takes back where it is short.",
    "Elapsed times are of this machine and its load; another machine, disk or load has other times.",
    "Files are read from the page cache of this machine: reading from a network disk comes on top.",
    "Phantom files are as well-formed as their dirt allows; real ones may hold faults that it does not draw.",
    "At two epochs and small sizes, scores mean nothing: only that every step runs and writes its files is shown.",
)


def memory(kind: str = "VmHWM") -> float:
    """Memory of this process in MiB: resident at its peak; RssAnon: now, without pages of files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(kind)).split()[1]) / 1024


def size(*folders: Path) -> int:
    """Bytes of all files below these folders."""
    return sum(path.stat().st_size for folder in folders for path in folder.rglob("*") if path.is_file())


def read_tables(folder: Path) -> dict[str, float]:
    """Read, check and cut the tables of a data folder without images, as 01 and 02 do; what it cost."""
    comp = competition.read(folder)
    labels = checks.label_table(comp)
    labels = labels.merge(make_folds(labels, 5, seed=52), on="study_id").assign(train_on=True)
    graded = training_labels(labels[labels["fold"] > 0])
    assert graded["study_id"].nunique() + (labels["fold"] == 0).sum() // 25 == labels["study_id"].nunique()
    return {"rows": len(labels), "cpu_s": time.process_time(), "memory": memory()}


def cut_crops(run: Path) -> dict[str, float]:
    """Cut the crops of all studies of a run, as 04 does, about the readers' points; what it cost."""
    parameters, labels = read_parameters(run), pd.read_parquet(run / "tables/labels.parquet")
    config = VitConfig(**{name: parameters[f"vit_{name}"] for name in VitConfig.__dataclass_fields__})
    count, held, began = labels["study_id"].nunique(), [], time.process_time()

    def read() -> Iterable[tuple[int, list]]:
        for study in sorted(labels["study_id"].unique()):
            yield study, load_study(run / "slices", study)
            held.append(memory("RssAnon"))

    ids, inputs = study_inputs(read(), crop_centres(labels), config, run / "work/crops.npy", count)
    return {"studies": len(ids), "bytes": inputs.nbytes, "cpu_s": time.process_time() - began, "memory": max(held)}


def in_child(name: str, folder: Path) -> dict[str, float]:
    """What a function of this script returns in a process of its own."""
    command = [sys.executable, __file__, "--child", name, str(folder)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def run(project: Path, name: str, data: Path, *arguments: str) -> pd.DataFrame:
    """Run profile kaggle on a data folder; the costs of its steps."""
    done = run_all(project, "--profile", "kaggle", "--run", name, "--data", str(data), *arguments, timeout=DAYS)
    if done.returncode:
        raise SystemExit(f"the run {name} stopped:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    return costs.step_table(project / "outputs" / name)


def images_a_study(folder: Path) -> dict[str, float]:
    """Images that an epoch shows of each study, by detector."""
    repeats = read_parameters(folder)["yolo_repeats"]
    tables = {key: pd.read_csv(folder / f"yolo/{key}/images.csv") for key in GROUPS}
    shown = {key: training_images(table, table["study_id"], repeats)["weight"].sum() for key, table in tables.items()}
    return {key: shown[key] / tables[key]["study_id"].nunique() for key in GROUPS}


def measure(project: Path, count: int, overrides: list[str]) -> dict[str, float]:
    """Costs of 00 to 02 and of the crops of `count` studies at real pixel sizes."""
    data = project / f"data-{count}"
    phantom.write_phantom(data, count, 1, seed=2025, workers=usable_cores(), scale="realistic")
    for step in ("01", "02"):
        table = run(project, f"studies{count}", data, "--until", step, *overrides)
    folder = project / "outputs" / f"studies{count}"
    series, crops = pd.read_parquet(folder / "tables/series.parquet"), in_child("cut_crops", folder)
    measured = {"slices": int(series.loc[series["split"] == "train", "n_slices"].sum())}
    for step, line in table.drop(index="00_get_data").iterrows():  # which only finds the folder
        measured |= {f"{step} elapsed, s": line["seconds"], f"{step} processor, s": line["cpu_s"]}
        measured[f"{step} memory, MiB"] = line["memory"]
    measured |= {"crops processor, s": crops["cpu_s"], "crops memory, MiB": crops["memory"]}
    places = {"files": data / "train_images", "8-bit slices": folder / "slices", "detectors' images": folder / "yolo"}
    measured |= {f"{name}, GB": size(place) / 1e9 for name, place in places.items()}
    measured["crops, GB"] = crops["bytes"] / 1e9
    measured |= {f"images an epoch and study, {key}": shown for key, shown in images_a_study(folder).items()}
    shutil.rmtree(data)
    shutil.rmtree(folder)
    return measured


def extrapolated(table: pd.DataFrame, count: float, slices: float, upto: int) -> pd.Series:
    """The costs of `count` studies with `slices` slices, from the first `upto` columns of a table of measured costs.

    Along the line through the last two, never falling; from one alone in proportion, memory unchanged. Crops go by
    studies, all else by slices.
    """
    known = table.iloc[:, :upto]
    last, before = known.iloc[:, -1], known.iloc[:, -2] if upto > 1 else 0 * known.iloc[:, -1]
    by_slice = pd.Series(slices - last["slices"], table.index) / (last["slices"] - before["slices"])
    by_study = (count - known.columns[-1]) / (known.columns[-1] - (known.columns[-2] if upto > 1 else 0))
    steps = by_slice.where(~table.index.str.startswith("crops"), by_study)
    growing = table.index.str.contains(" s$| GB$") | (table.index.str.contains("MiB") & (upto > 1))
    values = last + (last - before).clip(lower=0).where(growing, 0) * steps
    return values.where(table.index != "slices", slices)


def rehearse_slices(project: Path, counts: list[int], overrides: list[str]) -> None:
    """Part 2: print what studies at real pixel sizes cost, at full size too, and how well the rule holds."""
    measured = {}
    for count in counts:
        if shutil.disk_usage(project).free < SPARE + count * A_STUDY:
            need = f"they take {count * A_STUDY / 1e9:.0f} GB, and {SPARE / 1e9:.0f} must stay free"
            print(f"{count} studies are left out: {need}")
            break
        measured[count] = measure(project, count, overrides)
        print(f"measured {count} studies, {measured[count]['slices']} slices", flush=True)
    table = pd.DataFrame(measured)
    shown = table.rename(columns="{} studies".format)
    for upto, count in enumerate(table.columns[:-1], start=1):
        expected = extrapolated(table, table.columns[-1], table.iloc[:, -1]["slices"], upto)
        shown[f"{table.columns[-1]} from {count}"] = expected
    shown["full size"] = extrapolated(table, STUDIES, SLICES, len(table.columns))
    print(f"\nStudies at real pixel sizes, {usable_cores()} cores; full size: {STUDIES} studies, {SLICES} slices")
    print(shown.to_string(float_format="%.2f"), flush=True)


def rehearse_fold(project: Path, count: int, overrides: list[str]) -> None:
    """Part 3: run one fold of profile kaggle to the report and print the costs of its steps. Without --full its
    transformers are the smallest of their families, at 64 pixels."""
    data = project / "data-fold"
    phantom.write_phantom(data, count, 4, seed=2026, workers=usable_cores(), scale="realistic")
    table = run(project, "fold", data, "folds=0", *EPOCHS, *overrides)
    report = project / "outputs/fold/report/index.html"
    scores = json.loads((project / "outputs/fold/scores.json").read_text())["oof"]["scores"]
    print(f"\nOne fold of profile kaggle on {count} studies; {', '.join([*EPOCHS, *overrides])}")
    print(table.to_string(float_format="%.1f"))
    print(
        f"report: {report.stat().st_size} bytes; out of fold: {json.dumps({k: v['total'] for k, v in scores.items()})}"
    )


def rehearse_tables(folder: Path, count: int) -> None:
    """Part 1: print what the tables of as many studies as the real data set has cost."""
    began = time.perf_counter()
    phantom.write_phantom(folder, count, 1, seed=2024, workers=usable_cores(), images=False)
    seconds, read = time.perf_counter() - began, in_child("read_tables", folder)
    print(f"tables of {count} studies, {size(folder) / 1e6:.0f} MB: written in {seconds:.0f} s;")
    print(
        f"{read['rows']} labels read in {read['cpu_s']:.0f} s of processor time with {read['memory']:.0f} MiB",
        flush=True,
    )


def main(arguments: Iterable[str] | None = None) -> None:
    """Rehearse and print tables and assumptions."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tables", type=int, default=STUDIES, help="studies of part 1; 0: without it")
    parser.add_argument(
        "--studies", type=int, nargs="*", default=[25, 50, 100], help="counts of part 2; none: without it"
    )
    parser.add_argument("--fold", type=int, default=24, help="studies of part 3; 0: without it")
    parser.add_argument("--full", action="store_true", help="the profile's sizes in part 3, for a GPU")
    parser.add_argument("--folder", help="where the temporary folder is made")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="parameters of parts 2 and 3")
    asked = parser.parse_intermixed_args(arguments)
    if asked.child:
        functions: dict[str, Any] = {"read_tables": read_tables, "cut_crops": cut_crops}
        print(json.dumps(functions[asked.child[0]](Path(asked.child[1]))))
        return
    with tempfile.TemporaryDirectory(dir=asked.folder, prefix="lsdc-rehearsal-") as temporary:
        project = copy_project(Path(temporary) / "project")
        if asked.tables:
            rehearse_tables(Path(temporary) / "tables", asked.tables)
        if asked.studies:
            rehearse_slices(project, sorted(asked.studies), asked.overrides)
        if asked.fold:
            rehearse_fold(project, asked.fold, [*([] if asked.full else SMALLEST), *asked.overrides])
    print("\nTaken for granted:", *ASSUMED, sep="\n- ")


if __name__ == "__main__":
    main()
