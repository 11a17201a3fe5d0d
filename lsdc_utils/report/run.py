"""What a finished run says: its files, the sentences and the tables of text made from them."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from lsdc_utils.metric import PARTS
from lsdc_utils.vocabulary import GROUPS, MISSING

MODEL_NAMES = {
    "prior": "Label frequency",
    "yolo": "YOLOv10 detectors",
    "vit3d": "3D ViT",
    "ensemble": "Ensemble",
    "oracle": "Oracle",
}
PART_NAMES = dict(zip(PARTS, ("Spinal canal", "Foraminal", "Subarticular", "Any severe canal", "Total"), strict=True))
BLOCK_NAMES = {"oof": "Out of fold", "test": "Test"}
SHARES = {"within_5_mm": "Within 5 mm (%)", "within_10_mm": "Within 10 mm (%)",
          "in_plane_within_5_mm": "In plane within 5 mm (%)", "level_right": "Correct level (%)"}  # fmt: skip
# Columns of other tables that are shown, with their titles.
INTERVAL = {"low": "95 % from", "high": "to"}
ABLATION = {"total": "Out of fold", "worse_by": "Change", **INTERVAL, **{part: PART_NAMES[part] for part in PARTS[:3]}}
CURVE = {"total": "Score", **INTERVAL, "skill": "Skill"}
SETTINGS = {"score": "Score", "skill": "Skill", **INTERVAL, "lost": "Skill lost", "lost_low": "95 % from",
            "lost_high": "to"}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """The files of a run that its report is made from; a missing table is empty, a missing JSON or YAML file is {}."""

    folder: Path
    scores: dict[str, Any]  # scores.json: {"oof": block, "test": block or None}
    evaluation: dict[str, Any]  # evaluation.json, from 06
    stress: dict[str, Any]  # stress/numbers.json, from 07
    data: dict[str, Any]  # data.json: data_dir and kind
    parameters: dict[str, Any]  # parameters.yml; {} where the notebooks were executed by hand
    labels: pd.DataFrame  # tables/labels.parquet
    rows: pd.DataFrame  # predictions/ensemble_oof.parquet: row_id and three natural probabilities
    findings: pd.DataFrame  # tables/findings.csv
    localisation: pd.DataFrame  # localisation.csv
    doses: pd.DataFrame  # stress/doses.csv
    settings: pd.DataFrame  # stress/settings.csv
    experiments: dict[str, pd.DataFrame]  # ablation and curve, if they were run
    steps: pd.DataFrame  # one line a step: step, seconds, memory (MiB), load (cores in use)

    @property
    def name(self) -> str:
        """The run's name, which is that of its folder."""
        return self.folder.name

    def asks_for(self, step: str) -> bool:
        """Whether the run's parameters ask for this step: an earlier start may have trained more folds."""
        fold = re.search(r"_fold(\d+)$", step)
        return fold is None or int(fold[1]) in self.parameters.get("folds", [int(fold[1])])


def read_run(run_dir: str | Path) -> Run:
    """Read a run's folder; FileNotFoundError names scores.json where 05_ensemble_inference has not written it."""
    folder = Path(run_dir).resolve()
    experiments = {name: _read(folder / f"experiments/{name}.csv") for name in ("ablation", "curve")}
    return Run(
        folder=folder,
        scores=json.loads((folder / "scores.json").read_text()),
        evaluation=_read(folder / "evaluation.json"),
        stress=_read(folder / "stress/numbers.json"),
        data=_read(folder / "data.json"),
        parameters=_read(folder / "parameters.yml"),
        labels=_read(folder / "tables/labels.parquet"),
        rows=_read(folder / "predictions/ensemble_oof.parquet"),
        findings=_read(folder / "tables/findings.csv", dtype=str, keep_default_na=False),
        localisation=_read(folder / "localisation.csv"),
        doses=_read(folder / "stress/doses.csv"),
        settings=_read(folder / "stress/settings.csv"),
        experiments={name: table for name, table in experiments.items() if len(table)},
        steps=_read_steps(folder / "logs"),
    )


def _read(file: Path, **options: Any) -> Any:
    if file.suffix in (".json", ".yml"):
        load = json.loads if file.suffix == ".json" else yaml.safe_load
        return load(file.read_text()) if file.is_file() else {}
    if not file.is_file():
        return pd.DataFrame()
    return pd.read_parquet(file) if file.suffix == ".parquet" else pd.read_csv(file, **options)


def _read_steps(logs: Path) -> pd.DataFrame:
    """Cost of each step from Snakemake's benchmark files <step>.tsv."""
    lines = []
    for file in sorted(logs.glob("*.tsv")):
        line = pd.read_csv(file, sep="\t").iloc[-1]
        seconds, memory, load = pd.to_numeric(line.reindex(["s", "max_rss", "mean_load"]), errors="coerce")
        lines.append((file.stem, seconds, memory, load / 100))
    return pd.DataFrame(lines, columns=["step", "seconds", "memory", "load"])


def labelled_rows(run: Run) -> pd.DataFrame:
    """Out-of-fold rows of the ensemble with their label: row_id, three natural probabilities, condition, severity."""
    if run.rows.empty or run.labels.empty:
        return pd.DataFrame()
    labels = run.labels.loc[run.labels["severity"] != MISSING, ["row_id", "condition", "severity"]]
    return run.rows.merge(labels, on="row_id")


def box_sizes(run: Run) -> dict[str, float]:
    """Side in mm of the boxes that the detectors were trained on, by condition group (nfn, scs, ss), if known."""
    files = {key: sorted((run.folder / "weights").glob(f"yolo_{key}_fold*.json")) for key in GROUPS}
    return {key: float(_read(some[0])["config"]["box_mm"]) for key, some in files.items() if some}


# ---- scores --------------------------------------------------------------------------------------------------------


def model_name(model: str) -> str:
    """A model of scores.json as people read it."""
    return MODEL_NAMES.get(model, model)


def blocks(scores: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The blocks of scores.json that exist, out of fold first."""
    return {name: scores[name] for name in BLOCK_NAMES if scores.get(name)}


def models(scores: dict[str, Any]) -> list[str]:
    """Models that any block scores, in the order of `MODEL_NAMES`; unknown ones last."""
    scored = {model for block in blocks(scores).values() for model in block["scores"]}
    return [model for model in MODEL_NAMES if model in scored] + sorted(scored - set(MODEL_NAMES))


def value(block: dict[str, Any], kind: str, model: str, part: str = "total") -> Any:
    """A number of a block of scores.json, or an interval's [low, high]; None where the block has none."""
    content = ((block.get(kind) or {}).get(model) or {}).get(part)
    return None if content == [None, None] else content


def number(amount: float | None, digits: int = 3) -> str:
    """A number as text, a dash where there is none."""
    return "–" if pd.isna(amount) else f"{amount:.{digits}f}"


def score_columns(block: dict[str, Any], shown: list[str]) -> dict[str, list[str]]:
    """Total score, skill (if there is an oracle) and 95 % interval of each model in a block, as text."""
    columns = {"Score": [number(value(block, "scores", model)) for model in shown]}
    if block.get("skill"):
        columns["Skill"] = [number(value(block, "skill", model), 2) for model in shown]
    intervals = [value(block, "interval", model) or [None] for model in shown]
    return columns | {"95 % interval": [" to ".join(map(number, interval)) for interval in intervals]}


def score_table(scores: dict[str, Any]) -> pd.DataFrame:
    """Total scores as text: a row for each model, columns for each block."""
    index = pd.Index(map(model_name, models(scores)), name="Model")
    parts = {
        f"{BLOCK_NAMES[name]}, {block['n_studies']} studies": pd.DataFrame(score_columns(block, models(scores)), index)
        for name, block in blocks(scores).items()
    }
    return pd.concat(parts, axis=1)


def parts_table(block: dict[str, Any]) -> pd.DataFrame:
    """Parts of a block's scores as text, with the skill in brackets if there is one: a row for each model."""
    table = pd.DataFrame(index=pd.Index(map(model_name, block["scores"]), name="Model"))
    for part in PARTS[:-1]:
        skills = [value(block, "skill", model, part) for model in block["scores"]]
        brackets = ["" if skill is None else f" ({skill:.2f})" for skill in skills]
        texts = [number(value(block, "scores", model, part)) for model in block["scores"]]
        table[PART_NAMES[part]] = [text + bracket for text, bracket in zip(texts, brackets, strict=True)]
    return table


def other_runs(run: Run) -> pd.DataFrame:
    """Ensembles of the finished runs beside this one, as text: this run first; empty where there is no other run."""
    files = sorted(run.folder.parent.glob("*/scores.json"), key=lambda file: (file.parent != run.folder, file))
    lines = {}
    for file in files if len(files) > 1 else ():
        data_dir = _read(file.with_name("data.json")).get("data_dir", "unknown")
        line = {("", "Data"): "the same" if data_dir == run.data.get("data_dir") else Path(data_dir).name}
        for name, block in blocks(_read(file)).items():
            columns = score_columns(block, ["ensemble"])
            line |= {(BLOCK_NAMES[name], title): text for title, [text] in columns.items()}
        lines[file.parent.name] = line
    return pd.DataFrame.from_dict(lines, orient="index").fillna("–").rename_axis("Run")


# ---- what else was measured ----------------------------------------------------------------------------------------


def localisation_table(localisation: pd.DataFrame) -> pd.DataFrame:
    """Localisation as text, from localisation.csv: a row for each block and condition, and one for axial slices."""
    if localisation.empty:
        return localisation
    rows = localisation[localisation["spines"] == "all"].rename(columns=SHARES)
    shown = [title for title in SHARES.values() if title in rows]
    names = rows["split"].map(BLOCK_NAMES) + ": " + rows["condition"].str.replace("_", " ")
    table = (100 * rows[shown]).map(number, digits=1).set_index(names.rename("Points"))
    return table.assign(**{"Sides exchanged": rows["sides_exchanged"].map(number, digits=0).to_numpy()})


def evaluation_table(evaluation: dict[str, Any]) -> pd.DataFrame:
    """Agreement and calibration of the ensemble as text, from evaluation.json: a row for each block and part."""
    lines = {}
    for block, name in BLOCK_NAMES.items():
        kappa, error = (evaluation.get(key, {}).get(block, {}) for key in ("kappa", "calibration"))
        for part in dict.fromkeys([*kappa, *error]):
            linear = kappa.get(part, {}).get("linear", {})
            lines[f"{name}: {part}"] = {
                "Linear kappa": number(linear.get("ensemble"), 2),
                "Linear kappa of two readers": number(linear.get("two readers"), 2),
                "Calibration error": number(error.get(part, {}).get("ensemble")),
            }
    return pd.DataFrame.from_dict(lines, orient="index")


def experiment_tables(experiments: dict[str, pd.DataFrame]) -> dict[str, pd.DataFrame]:
    """Ablations and learning curve as text, by heading; scores are the ensemble's, lower is better.

    A heading names the commit of the experiment, which may be older than the run's.
    """
    tables = {}
    for name, table in experiments.items():
        commit = f" (commit {table['commit'].iloc[0][:12]})" if "commit" in table else ""
        if name == "ablation":
            removed = table["without"].fillna("nothing (the run itself)").rename("Removed")
            tables[f"Ablations{commit}"] = _as_text(table, ABLATION, removed)
        else:
            sizes = table["n_train"].map(str) + ", " + table["block"].map(BLOCK_NAMES).str.lower()
            tables[f"Learning curve{commit}"] = _as_text(table, CURVE, sizes.rename("Training studies"))
    return tables


def settings_table(settings: pd.DataFrame) -> pd.DataFrame:
    """Scores under degraded images as text, from stress/settings.csv: a row for each setting."""
    if settings.empty:
        return settings
    factor, setting = settings["factor"], settings["setting"]
    names = setting.where(setting == factor, factor + ": " + setting)
    return _as_text(settings, SETTINGS, names.rename("Setting"))


def _as_text(table: pd.DataFrame, columns: dict[str, str], index: pd.Series) -> pd.DataFrame:
    """The columns that the table has, as text under their titles."""
    return table[[name for name in columns if name in table]].map(number).rename(columns=columns).set_index(index)
