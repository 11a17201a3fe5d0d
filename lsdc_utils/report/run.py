"""What a finished run holds: its files, what it takes to repeat it, and the tables of text made from them."""

import hashlib
import json
import platform
import re
import shutil
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import yaml

from lsdc_utils.costs import step_table
from lsdc_utils.files import count_studies, git_commit, write_json
from lsdc_utils.grading.basis import training_studies
from lsdc_utils.grading.blend import family
from lsdc_utils.grading.evaluation import judge
from lsdc_utils.metric import GROUP_PARTS, MEAN, PARTS, only_groups, overall, solution_of
from lsdc_utils.parallel import usable_cores
from lsdc_utils.vocabulary import GROUPS

MODEL_NAMES = {"prior": "Label frequency", "yolo": "YOLOv10 detectors", "vit3d": "3D ViT", "ensemble": "Ensemble",
               "oracle": "Oracle"}  # fmt: skip
PART_NAMES = dict(zip(PARTS, ("Spinal canal", "Foraminal", "Subarticular", "Any severe canal", "Total"), strict=True))
PART_NAMES[MEAN] = "Mean of groups"
BLOCK_NAMES = {"oof": "Out of fold", "test": "Test"}
PACKAGES = ("torch", "torchvision", "ultralytics", "timm", "numpy", "pandas", "pydicom", "snakemake", "papermill")
SEEDS = ("phantom_seed", "seed", "n_splits", "folds")
TITLES = {  # of the columns that tables show, in this order
    "within_5_mm": "Within 5 mm (%)", "within_10_mm": "Within 10 mm (%)",
    "in_plane_within_5_mm": "In plane within 5 mm (%)", "level_right": "Correct level (%)",
    "total": "Score", "worse_by": "Change", "score": "Score", "skill": "Skill", "low": "95 % from", "high": "to",
    "lost": "Skill lost", "lost_low": "95 % from", "lost_high": "to", **{key: PART_NAMES[key] for key in GROUP_PARTS},
}  # fmt: skip


STEP = re.compile(r"[^-]*?(?:_(nfn|scs|ss))?(?:-(.+?))?(?:_fold(\d+)(?:_inner\d+)?)?")  # condition, member, fold


class Run:
    """The files of a run that its report is made from; FileNotFoundError where 05 has not written scores.json."""

    def __init__(self, run_dir: str | Path):
        self.folder = folder = Path(run_dir).resolve()
        self.name = folder.name
        self.scores = json.loads((folder / "scores.json").read_text())  # {"oof": block, "test": block or None}
        self.recipe = read_file(folder / "blend.json")
        self.conditions = self.recipe.get("conditions", list(GROUPS))  # that were trained
        self.evaluation = read_file(folder / "evaluation.json")  # from 06
        self.data = read_file(folder / "data.json")  # data_dir and kind
        self.parameters = read_file(folder / "parameters.yml")  # {} where the notebooks were executed by hand
        self.labels = read_file(folder / "tables/labels.parquet")
        self.rows = read_file(folder / "predictions/ensemble_oof.parquet")  # row_id and three natural probabilities
        files = (folder / f"tables/{name}.csv" for name in ("findings", "training_findings"))  # from 01 and 05
        self.findings = pd.concat(read_file(file, dtype=str, keep_default_na=False) for file in files)
        self.localisation = read_file(folder / "localisation.csv")
        stress = folder / ("stress" if self.asks_for("07_stress_tests") else "no stress tests")
        self.stress = read_file(stress / "numbers.json")  # from 07
        self.doses, self.settings = (read_file(stress / f"{name}.csv") for name in ("doses", "settings"))
        tables = {name: read_file(folder / f"experiments/{name}.csv") for name in ("ablation", "curve")}
        self.experiments = {name: t.assign(total=t[overall(t)]) for name, t in tables.items() if len(t)}
        table = step_table(folder)
        self.steps = table.loc[[self.asks_for(step) for step in table.index]]

    def asks_for(self, step: str) -> bool:
        """Whether this step is part of the run as its parameters are now: an earlier start may have had other folds,
        conditions or members, or stress tests."""
        own, (key, member, fold) = self.parameters, STEP.fullmatch(step).groups()
        if step == "07_stress_tests":
            return own.get("stress_bodies", 1) > 0 and len(self.conditions) == len(GROUPS)
        members = [one["name"] for one in own.get("vit_members", [{"name": member}])] or [None]
        asked = fold is None or int(fold) in own.get("folds", [int(fold)])
        return asked and (key is None or key in self.conditions) and (not step.startswith("04_") or member in members)


def read_file(file: Path, **options: Any) -> Any:
    """A JSON or YAML file, or a Parquet or CSV table (`options` of pandas); {} or an empty table if there is none."""
    if not file.is_file():
        return {} if file.suffix in (".json", ".yml") else pd.DataFrame()
    if file.suffix in (".json", ".yml"):
        return (json.loads if file.suffix == ".json" else yaml.safe_load)(file.read_text())
    return pd.read_parquet(file) if file.suffix == ".parquet" else pd.read_csv(file, **options)


def labelled_rows(run: Run) -> pd.DataFrame:
    """Out-of-fold rows of the ensemble with their label, as `evaluation.judge` gives them."""
    if run.rows.empty or run.labels.empty:
        return pd.DataFrame()
    return judge(run.rows, solution_of(only_groups(run.labels, run.conditions)))


def write_provenance(run: Path) -> dict[str, Any]:
    """Write and return the provenance of the run in folder `run`. The fingerprint of the data is a hash of tables and
    headers, not of pixels. Except for paths among the parameters, nothing names the machine or its user."""
    data, weights = read_file(run / "data.json"), {}
    if data:
        folder, digest = (run / data["data_dir"]).resolve(), hashlib.sha256()
        for file in (*sorted(folder.glob("*.csv")), run / "tables/series.parquet"):
            if file.is_file():
                digest.update(f"{file.name}\0".encode() + file.read_bytes())
        data = {"kind": data["kind"], "folder": folder.name, "fingerprint": digest.hexdigest()}
        data["studies"] = training_studies(run)
    for file in sorted((run / "weights").glob("*.json")):
        weights[file.stem] = {key: read_file(file)[key] for key in ("sha256", "git_commit")}
    cpu, gpus = Path("/proc/cpuinfo"), []
    if shutil.which("nvidia-smi"):
        from torch import cuda  # takes seconds, which a machine without a GPU need not spend

        gpus = [cuda.get_device_name(k) for k in range(cuda.device_count())]
    processor = re.search(r"^model name\s*: (.*)$", cpu.read_text() if cpu.is_file() else "", re.MULTILINE)
    content = {
        "made": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": git_commit(),
        "parameters": read_file(run / "parameters.yml"),
        "data": data,
        "weights": weights,
        "machine": {
            "processor": processor[1] if processor else platform.machine(),
            "cores": usable_cores(),
            "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
            "gpus": gpus,
            "system": platform.system(),
            "python": platform.python_version(),
        },
        "versions": dict(sorted((package.name, package.version) for package in metadata.distributions())),
    }
    write_json(run / "provenance.json", content)
    return content


def provenance(run: Run) -> dict[str, str]:
    """The origin of a run as label -> text, from its provenance.json; FileNotFoundError where it has no report yet."""
    content = json.loads((run.folder / "provenance.json").read_text())
    seeds = [f"{key} {run.parameters[key]}" for key in SEEDS if key in run.parameters]
    head, *changes = content["commit"].split(" ", 1)
    machine, data, about = content["machine"], content["data"], content.get("adapted")
    hardware = [machine["processor"], f"{machine['cores']} cores", f"{machine['memory_gib']} GiB", *machine["gpus"]]
    return {
        "Made": content["made"],
        "Commit": " ".join([head[:12], *changes]),
        "Data": f"{data['kind']} ({data['folder']}), tables {data['fingerprint'][:12]}" if data else "unknown",
        "Seeds and folds": ", ".join(seeds) or "not recorded",
        **({"Blend": "of run {run}, fitted to {studies} studies of a folder".format(**about)} if about else {}),
        "Versions": ", ".join(f"{name} {content['versions'].get(name, '?')}" for name in PACKAGES),
        "Machine": f"{', '.join(hardware)}; {machine['system']}, Python {machine['python']}",
    }


def blocks(scores: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The blocks of scores.json that exist, out of fold first."""
    return {name: scores[name] for name in BLOCK_NAMES if scores.get(name)}


def models(scores: dict[str, Any]) -> list[str]:
    """Models that any block scores, in the order of `MODEL_NAMES`, members of a blend before it."""
    scored = dict.fromkeys(model for block in blocks(scores).values() for model in block["scores"])
    return [model for kind in MODEL_NAMES for model in scored if kind in (model, family(model))]


def model_name(model: str) -> str:
    """A model's name in words; a member of the transformers' blend has its own behind that of its kind."""
    return MODEL_NAMES.get(model, f"3D ViT {model.removeprefix('vit3d-')}" if family(model) != model else model)


def value(block: dict[str, Any], kind: str, model: str, part: str = "") -> Any:
    """A number of a block of scores.json, or an interval's [low, high]; None where the block has none. part: by default
    the `metric.overall` one."""
    parts = (block.get(kind) or {}).get(model) or {}
    content = parts.get(part or overall(parts))
    return None if content == [None, None] else content


def number(amount: float | None, digits: int = 3) -> str:
    """A number as text, a dash where there is none."""
    return "–" if pd.isna(amount) else f"{amount:.{digits}f}"


def score_columns(block: dict[str, Any], shown: list[str]) -> pd.DataFrame:
    """Overall score, skill (if there is an oracle) and 95 % interval of models in a block, as text."""
    table = pd.DataFrame(index=pd.Index([model_name(model) for model in shown], name="Model"))
    title = "Score" if "groups" not in block else PART_NAMES[MEAN]
    table[title] = [number(value(block, "scores", model)) for model in shown]
    if block.get("skill"):
        table["Skill"] = [number(value(block, "skill", model), 2) for model in shown]
    intervals = [value(block, "interval", model) or [None] for model in shown]
    return table.assign(**{"95 % interval": [" to ".join(map(number, interval)) for interval in intervals]})


def score_table(scores: dict[str, Any]) -> pd.DataFrame:
    """Total scores as text: a row for each model, columns for each block."""
    titles = {name: f"{BLOCK_NAMES[name]}, {count_studies(b['n_studies'])}" for name, b in blocks(scores).items()}
    return pd.concat({title: score_columns(scores[k], models(scores)) for k, title in titles.items()}, axis=1)


def parts_table(block: dict[str, Any]) -> pd.DataFrame:
    """Parts of a block's scores as text, with the skill in brackets if there is one: a row for each model."""
    table = pd.DataFrame(block["scores"]).T[list(PARTS[:-1])].map(number)
    if block.get("skill"):
        skills = pd.DataFrame(block["skill"]).T[table.columns]
        table += skills.map(lambda skill: "" if pd.isna(skill) else f" ({skill:.2f})")
    return table.rename(index=model_name, columns=PART_NAMES).rename_axis("Model")


def other_runs(run: Run) -> pd.DataFrame:
    """Ensembles of the finished runs beside this one, as text: this run first; empty where there is no other run. A
    score is the total, or the mean of the groups that `Conditions` names."""
    found = (file.with_name("scores.json") for file in run.folder.parent.glob("*/data.json"))  # not ready-made models
    files, lines = sorted(filter(Path.is_file, found), key=lambda file: (file.parent != run.folder, file)), {}
    for file in files if len(files) > 1 else ():
        adapted = "adapted" in read_file(file.with_name("blend.json"))
        data_dir = "a folder" if adapted else read_file(file.with_name("data.json"))["data_dir"]
        line = {("", "Data"): "the same" if data_dir == run.data.get("data_dir") else Path(data_dir).name}
        for name, block in blocks(read_file(file)).items():
            line["", "Conditions"] = ", ".join(block.get("groups", ["all"]))
            own = score_columns(block, ["ensemble"]).rename(columns={PART_NAMES[MEAN]: "Score"}).iloc[0]
            line |= {(BLOCK_NAMES[name], key): text for key, text in own.items()}
        lines[file.parent.name] = line
    return pd.DataFrame.from_dict(lines, orient="index").fillna("–").rename_axis("Run")


def localisation_table(localisation: pd.DataFrame) -> pd.DataFrame:
    """Localisation as text, from localisation.csv: a row for each block and condition, and one for axial slices."""
    if localisation.empty:
        return localisation
    rows = localisation[localisation["spines"] == "all"]
    names = rows["split"].map(BLOCK_NAMES) + ": " + rows["condition"].str.replace("_", " ")
    table = _as_text(100 * rows.select_dtypes("number"), names.rename("Points"), digits=1)
    return table.assign(**{"Sides exchanged": rows["sides_exchanged"].map(number, digits=0).to_numpy()})


def evidence_table(evaluation: dict[str, Any]) -> pd.DataFrame:
    """Shares of pairs of one level or canal that each model orders right, as text, from evaluation.json."""
    blocks = evaluation.get("own_evidence", {})
    rows = {f"{BLOCK_NAMES[name]}: {part}": row for name, parts in blocks.items() for part, row in parts.items()}
    table = pd.DataFrame.from_dict(rows, orient="index").rename(columns=model_name).rename_axis("Pairs of rows")
    return table.map(number, digits=2).assign(pairs=table["pairs"].map("{:.0f}".format)) if rows else table


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
    """Scores of the ensemble in ablations and learning curve as text; headings name the commit of the experiment."""
    tables = {}
    for name, table in experiments.items():
        if name == "ablation":
            title, name = "Ablations, out of fold", "Removed"
            index = table["without"].fillna("nothing (the run itself)")
        else:
            title, name = "Learning curve", "Training studies"
            index = table["n_train"].map(str) + ", " + table["block"].map(BLOCK_NAMES).str.lower()
        tables[f"{title} (commit {table['commit'].iloc[0][:12]})"] = _as_text(table, index.rename(name))
    return tables


def settings_table(settings: pd.DataFrame) -> pd.DataFrame:
    """Scores under degraded images as text, from stress/settings.csv: a row for each setting."""
    if settings.empty:
        return settings
    factor, setting = settings["factor"], settings["setting"]
    return _as_text(settings, setting.where(setting == factor, factor + ": " + setting).rename("Setting"))


def _as_text(table: pd.DataFrame, index: pd.Series, digits: int = 3) -> pd.DataFrame:
    """The columns that have `TITLES`, as text."""
    shown = table[[name for name in TITLES if name in table]].map(number, digits=digits)
    return shown.rename(columns=TITLES).set_index(index)
