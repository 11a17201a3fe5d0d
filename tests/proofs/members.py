"""The blend of members against its best member, measured: `python tests/proofs/members.py [SEED ...]`.

For each seed, of a phantom of the demo's size and of training, a run trains the transformers of `MEMBERS`. Squares lie
round points of the ready-made models, so no detector is trained. Rows out of fold and of test studies of all
seeds are pooled: is the members' blend better than the member that was best out of fold with its seed? The paired 95 %
interval is over studies. Runs lie in outputs/ and resume; a seed takes about 25 minutes of one core.

--also NAME ...: further settings of `ALSO` are trained too, on the phantom of the first seed, to the out-of-fold rows
alone, and compared with `plain`.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import yaml

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(Path(__file__).parent), str(ROOT)]

from chain import MISSED  # noqa: E402

from lsdc_utils import metric  # noqa: E402
from lsdc_utils.data.competition import data_dir  # noqa: E402
from lsdc_utils.grading.evaluation import difference  # noqa: E402
from lsdc_utils.pipeline.arguments import OUTPUTS  # noqa: E402

SEEDS = (111, 112, 113, 114, 115)  # fixed before the first run; neither the demo's nor the ready-made models'
TEST = 48  # test studies of each seed, so that more than 1,000 studies are pooled
MEMBERS = [  # the demo's transformer, and one that joins slices and grades in another way
    {"name": "plain"},
    {"name": "gru", "head": "softmax", "pooling": "gru", "seed": 54},
]
ALSO = {  # name -> what sets it apart from the demo's transformer
    "slices": {"vit_slice_epochs": 6},
    "mixup": {"vit_augment": {"mixup": 0.4}},
    "coarse": {"vit_wider": [[2.0, 3]]},
    "strong": {
        "vit_margin": 13,
        "vit_epochs": 30,
        "vit_augment": {"rotation": 0.2094, "scale": 0.032, "cut_off": 2.5, "warp": 0.5, "blur": 0.5, "noise": 0.05,
                        "holes": 0.2, "mixup": 0.4},
    },
}  # fmt: skip


def run(name: str, seed: int, members: list[dict], until: str) -> Path:
    """A run of these members, as far as a step; its folder."""
    given = [f"phantom_seed={seed}", f"seed={seed}", f"n_test={TEST}", "points_from=pretrained", "stress_bodies=0"]
    given.append(f"vit_members={json.dumps(members)}")
    command = ["./run_all.sh", "--run", name, "--cores", "1", "--until", until, *given]
    log = OUTPUTS / f"{name}.txt"
    with log.open("w") as file:
        if subprocess.run(command, cwd=ROOT, stdout=file, stderr=file).returncode:
            raise SystemExit(f"{name} stopped; see {log}")
    return OUTPUTS / name


def solution_of(folder: Path, part: str) -> pd.DataFrame:
    """The labels of a run's out-of-fold or test rows: row_id, severity."""
    if part == "test":
        return pd.read_csv(data_dir(folder) / "solution.csv")
    return metric.solution_of(pd.read_parquet(folder / "tables/labels.parquet"))


def tables_of(folder: Path, part: str) -> dict[str, pd.DataFrame]:
    """The blend's and the best member's rows of a part of a run; the member is chosen by its score out of fold."""
    scores = json.loads((folder / "scores.json").read_text())["oof"]["scores"]
    best = min((f"vit3d-{member['name']}" for member in MEMBERS), key=lambda name: scores[name]["total"])
    names = {"blend": "vit3d", "best": best} | {member["name"]: f"vit3d-{member['name']}" for member in MEMBERS}
    return {key: pd.read_parquet(folder / f"predictions/{name}_{part}.parquet") for key, name in names.items()}


def compared(solutions: list[pd.DataFrame], tables: list[dict[str, pd.DataFrame]], new: str, old: str) -> dict:
    """Scores of two kinds of rows, pooled, and the gain of the new one with its paired 95 % interval over studies."""
    solution = pd.concat(solutions, ignore_index=True)
    pooled = {key: pd.concat([each[key] for each in tables], ignore_index=True) for key in (new, old)}
    worse, low, high = difference(solution, pooled, new, old)["total"]
    score = {key: metric.score(solution, metric.weight_table(table))["total"] for key, table in pooled.items()}
    studies = solution["row_id"].str.split("_").str[0].nunique()
    return {"studies": studies, old: score[old], new: score[new], "gain": -worse, "low": -high, "high": -low}


def judge_blend(folders: list[Path]) -> tuple[list[dict[str, str]], bool]:
    """The gain of the blend over the best member and over each, on rows out of fold and of test studies together; and
    whether the interval of the first lies above 0."""
    pairs = [(folder, part) for folder in folders for part in ("oof", "test")]
    given = [solution_of(*pair) for pair in pairs], [tables_of(*pair) for pair in pairs]
    others = {"best": "the best out of fold on its phantom"} | {m["name"]: f"{m['name']} on all" for m in MEMBERS}
    lines = {words: compared(*given, "blend", key) | {"key": key} for key, words in others.items()}
    rows = [{"Member": words, "Its score": f"{line[line['key']]:.3f}", "Score of the blend": f"{line['blend']:.3f}",
             **gain_of(line), "Studies": str(line["studies"])} for words, line in lines.items()]  # fmt: skip
    return rows, lines[others["best"]]["low"] > 0


def judge_also(name: str, base: Path, folder: Path) -> dict[str, str]:
    """The gain of a further setting over the demo's transformer, out of fold; and how its curve ended."""
    folds = yaml.safe_load((folder / "parameters.yml").read_text())["folds"]
    read = [folder / f"predictions/vit3d-{name}_fold{fold}_oof.parquet" for fold in folds]
    tables = {name: pd.concat(map(pd.read_parquet, read)), "plain": tables_of(base, "oof")["plain"]}
    solution = solution_of(base, "oof")
    shared = solution["row_id"].isin(tables[name]["row_id"]) & solution["row_id"].isin(tables["plain"]["row_id"])
    line = compared([solution[shared]], [tables], name, "plain")
    ends = [curve_end(folder / f"logs/04_train_vit3d-{name}_fold{fold}.log") for fold in folds]
    return {"Change": name, "Its score": f"{line[name]:.3f}", "Score without it": f"{line['plain']:.3f}",
            **gain_of(line), "Held-out loss above its minimum": ", ".join(f"{end:.3f}" for end in ends)}  # fmt: skip


def gain_of(line: dict) -> dict[str, str]:
    """The gain and its interval as text."""
    return {"Gain": f"{line['gain']:+.3f}", "95 % interval": f"{line['low']:+.3f} to {line['high']:+.3f}"}


def curve_end(log: Path) -> float:
    """How far the last held-out loss that a training printed lies above the least."""
    losses = [float(loss) for loss in re.findall(r"^epoch .* held out ([\d.]+)", log.read_text(), re.MULTILINE)]
    return losses[-1] - min(losses)


def main() -> int:
    """Train what is not there yet, print tables, tab-separated, and whether the bar holds; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("seeds", nargs="*", type=int, default=SEEDS)
    parser.add_argument("--also", nargs="*", default=[], choices=ALSO)
    asked = parser.parse_args()
    folders = [run(f"members-{seed}", seed, MEMBERS, "05_ensemble_inference") for seed in asked.seeds]
    rows, holds = judge_blend(folders)
    print(f"{'holds' if holds else 'MISSED'}: the blend beats the best member, interval above 0")
    print(pd.DataFrame(rows).to_csv(sep="\t", index=False))
    base, lines = folders[0], []
    for name in asked.also:
        folder = run(f"{base.name}-{name}", asked.seeds[0], [{"name": name, **ALSO[name]}], "04_train_vit3d")
        lines.append(judge_also(name, base, folder))
    if lines:
        print(pd.DataFrame(lines).to_csv(sep="\t", index=False))
    return 0 if holds else MISSED


if __name__ == "__main__":
    sys.exit(main())
