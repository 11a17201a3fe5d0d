"""What a run's files say: scores as tables and sentences, what each step cost, and where the run comes from."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from lsdc_utils.metric import PARTS
from lsdc_utils.pipeline.steps import EXPERIMENT_TABLES
from lsdc_utils.vocabulary import CONDITIONS, GROUPS, MISSING

ROOT = Path(__file__).resolve().parents[2]
MODEL_NAMES = {
    "prior": "Prior",
    "yolo": "YOLOv10 detectors",
    "vit3d": "3D ViT",
    "ensemble": "Ensemble",
    "ensemble_calibrated": "Ensemble, calibrated",
    "oracle": "Oracle",
}
PART_NAMES = dict(zip(PARTS, ("Spinal canal", "Foraminal", "Subarticular", "Any severe canal", "Total"), strict=True))
BLOCK_NAMES = {"oof": "Out of fold", "test": "Test"}
PACKAGES = ("torch", "torchvision", "ultralytics", "timm", "numpy", "pandas", "pydicom", "snakemake", "papermill")
SEEDS = ("phantom_seed", "seed", "n_splits", "folds")


@dataclass(frozen=True)
class Run:
    """The files of a run that its report is made from; tables that the run does not have are empty."""

    folder: Path
    scores: dict[str, Any]  # scores.json: {"oof": block, "test": block or None}
    data: dict[str, Any]  # data.json: data_dir and kind
    parameters: dict[str, Any]  # parameters.yml; empty where the notebooks were executed by hand
    labels: pd.DataFrame  # tables/labels.parquet
    rows: pd.DataFrame  # predictions/ensemble_oof.parquet: row_id and three natural probabilities
    findings: pd.DataFrame  # tables/findings.csv
    localisation: pd.DataFrame  # localisation.csv, as text
    doses: pd.DataFrame  # stress/doses.csv
    settings: pd.DataFrame  # stress/settings.csv
    experiments: dict[str, pd.DataFrame]  # ablation, curve and noise, as far as those tables lie beside the run
    steps: pd.DataFrame  # one line a step: step, seconds, memory (MiB), load (cores in use)

    @property
    def name(self) -> str:
        """The run's name, which is its folder's."""
        return self.folder.name

    def asks_for(self, step: str) -> bool:
        """Whether the parameters still ask for this step: a fold may have been trained that is not any more."""
        fold = re.search(r"_fold(\d+)$", step)
        return fold is None or int(fold[1]) in self.parameters.get("folds", [int(fold[1])])


def read_run(run_dir: str | Path) -> Run:
    """Read a run's folder; FileNotFoundError names scores.json where 05_ensemble_inference has not written it."""
    folder = Path(run_dir).resolve()
    return Run(
        folder=folder,
        scores=json.loads((folder / "scores.json").read_text()),
        data=json.loads(_text(folder / "data.json")),
        parameters=yaml.safe_load(_text(folder / "parameters.yml")),
        labels=_table(folder / "tables/labels.parquet"),
        rows=_table(folder / "predictions/ensemble_oof.parquet"),
        findings=_table(folder / "tables/findings.csv"),
        localisation=_table(folder / "localisation.csv"),
        doses=pd.read_csv(file) if (file := folder / "stress/doses.csv").is_file() else pd.DataFrame(),
        settings=pd.read_csv(file) if (file := folder / "stress/settings.csv").is_file() else pd.DataFrame(),
        experiments={
            Path(name).stem: pd.read_csv(file) for name in EXPERIMENT_TABLES if (file := folder / name).is_file()
        },
        steps=read_steps(folder / "logs"),
    )


def _text(file: Path) -> str:
    return file.read_text() if file.is_file() else "{}"


def _table(file: Path) -> pd.DataFrame:
    if not file.is_file():
        return pd.DataFrame()
    return pd.read_parquet(file) if file.suffix == ".parquet" else pd.read_csv(file, dtype=str, keep_default_na=False)


def read_steps(logs: Path) -> pd.DataFrame:
    """Cost of each step from Snakemake's benchmark files <step>.tsv: step, seconds, memory (MiB), load (cores)."""
    lines = []
    for file in sorted(logs.glob("*.tsv")):
        line = pd.read_csv(file, sep="\t").iloc[-1]
        seconds, memory, load = pd.to_numeric(line.reindex(["s", "max_rss", "mean_load"]), errors="coerce")
        lines.append((file.stem, seconds, memory, load / 100))
    return pd.DataFrame(lines, columns=["step", "seconds", "memory", "load"])


def provenance(run: Run) -> dict[str, str]:
    """Where a run comes from, as label -> text: date, commit, data, seeds, versions and machine.

    It is told from the run's provenance.json; FileNotFoundError where the run has no report yet.
    """
    found = json.loads((run.folder / "provenance.json").read_text())
    seeds = [f"{key} {run.parameters[key]}" for key in SEEDS if key in run.parameters]
    head, *changes = found["commit"].split(" ", 1)
    machine, data = found["machine"], found["data"]
    gpus = f", {', '.join(machine['gpus'])}" if machine["gpus"] else ""
    return {
        "Made": found["made"],
        "Commit": " ".join([head[:12], *changes]),
        "Data": f"{data['kind']} ({data['folder']}), tables {data['fingerprint'][:12]}" if data else "unknown",
        "Seeds and folds": ", ".join(seeds) or "not recorded",
        "Versions": ", ".join(f"{name} {found['versions'].get(name, '?')}" for name in PACKAGES),
        "Machine": f"{machine['processor']}, {machine['cores']} cores, {machine['memory_gib']} GiB{gpus}; "
        f"{machine['system']}, Python {machine['python']}",
    }


def box_sizes(run: Run) -> dict[str, float]:
    """Side in mm of the boxes that each group's detectors were taught, by group (nfn, scs, ss), as far as known."""
    files = {key: sorted((run.folder / "weights").glob(f"yolo_{key}_fold*.json")) for key in GROUPS}
    return {key: float(json.loads(found[0].read_text())["config"]["box_mm"]) for key, found in files.items() if found}


def other_runs(run: Run) -> pd.DataFrame:
    """Ensembles of the finished runs beside this one, as text: a row a run, this one first; empty where it is alone."""
    lines = {}
    for file in sorted(run.folder.parent.glob("*/scores.json"), key=lambda file: (file.parent != run.folder, file)):
        scores, data = json.loads(file.read_text()), json.loads(_text(file.with_name("data.json")))
        same = data.get("data_dir") == run.data.get("data_dir")
        line = {"Data": "the same" if same else Path(data.get("data_dir", "unknown")).name}
        for name, title in BLOCK_NAMES.items():
            block = scores.get(name) or {}
            line[title] = number(value(block, "scores", "ensemble"))
            line[f"{title}: 95 % interval"] = " to ".join(map(number, value(block, "interval", "ensemble") or [None]))
            line[f"{title}: skill"] = number(value(block, "skill", "ensemble"), 2)
        lines[file.parent.name] = line
    table = pd.DataFrame.from_dict(lines, orient="index").rename_axis("Run")
    return table.loc[:, (table != "–").any()] if len(lines) > 1 else pd.DataFrame()


def limits(run: Run) -> dict[str, list[str]]:
    """What the results of this run do not show, as sentences under headings; numbers come from the run's files."""
    phantom = run.data.get("kind") == "phantom"
    collected = (
        "The studies are a phantom's: bodies, images and grades are drawn by a program. Scores on it say whether the "
        "pipeline learns, and what its parts are worth beside each other. They say nothing about patients."
        if phantom
        else "All studies come from one collection; other scanners, protocols and populations were not tried."
    )
    once = len(run.parameters.get("folds", []))
    return {
        "Data": [
            collected,
            f"{len(run.findings)} findings in the data were repaired or left out by rule; the summary lists them.",
        ],
        "Labels": list(_limits_of_labels(run, phantom)),
        "Models": [
            f"Each model was trained once for each of {once} folds, with one seed: intervals come from drawing studies "
            "again and leave out what another seed would change.",
            "A row whose series is missing, or on which nothing was found, is graded from the study's other rows or by "
            "counting labels. The page of a study says so; the probabilities of such a row tell less.",
            "Nothing in the models tells images of another part of the body, or of a spine after surgery, from what "
            "they learnt on.",
        ],
        "Scores": [
            *(_weakest(name, block) for name, block in blocks(run.scores).items()),
            "The score weighs a moderate label twice and a severe one four times. It does not measure benefit: what a "
            "grade changes in a patient's care was not studied.",
        ],
    }


def _limits_of_labels(run: Run, phantom: bool) -> Iterator[str]:
    """What one label a row cannot show, and how few of them are severe."""
    if phantom:
        yield "A row has one label, by a simulated reader who errs; how often is known from the phantom's oracle alone."
    else:
        yield "A row has one label, without a second reading: how far readers would agree is not known."
    labelled = labelled_rows(run)
    if labelled.empty:
        return
    parts = labelled["condition"].map({name: PART_NAMES[GROUPS[c.group].score] for name, c in CONDITIONS.items()})
    severe = labelled["severity"].eq(2).groupby(parts).sum()
    counts = ", ".join(f"{count} {name.lower()}" for name, count in severe.items())
    missing = int((run.labels["severity"] == MISSING).sum())
    yield (
        f"Severe labels are rare: {counts}, of {len(labelled)} labelled training rows. What is said of them rests on "
        f"few. {missing} training rows have no label."
    )


def _weakest(name: str, block: dict[str, Any]) -> str:
    """A sentence on the part of the score in which the ensemble is weakest."""
    kind, word, pick = ("skill", "skill", min) if block.get("skill") else ("scores", "score", max)
    found = {part: value(block, kind, "ensemble", part) for part in PARTS[:3]}
    known = {part: one for part, one in found.items() if one is not None}
    if not known:
        return f"{BLOCK_NAMES[name]}: no part of the score has enough labels."
    part = pick(known, key=known.get)
    return (
        f"{BLOCK_NAMES[name]}, on {block['n_studies']} studies, the weakest part is {PART_NAMES[part].lower()}, with a "
        f"{word} of {number(known[part], 2)}."
    )


# ---- scores --------------------------------------------------------------------------------------------------------


def model_name(model: str) -> str:
    """A model of scores.json as people read it."""
    return MODEL_NAMES.get(model, model)


def models(scores: dict[str, Any]) -> list[str]:
    """Models that any block scores, in the order prior, models, ensemble, oracle; unknown ones last."""
    named = {model for block in blocks(scores).values() for model in block["scores"]}
    return [model for model in MODEL_NAMES if model in named] + sorted(named - set(MODEL_NAMES))


def blocks(scores: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The blocks of scores.json that there are, out of fold first."""
    return {name: scores[name] for name in BLOCK_NAMES if scores.get(name)}


def value(block: dict[str, Any], kind: str, model: str, part: str = "total") -> Any:
    """A number of a block of scores.json, or an interval's [low, high]; None where the block has none."""
    found = ((block.get(kind) or {}).get(model) or {}).get(part)
    return None if found == [None, None] else found


def number(found: float | None, digits: int = 3) -> str:
    """A number as text, a dash where there is none."""
    return "–" if pd.isna(found) else f"{found:.{digits}f}"


def score_table(scores: dict[str, Any]) -> pd.DataFrame:
    """Total scores as text: a row a model; for out of fold and test the score, the skill and the 95 % interval."""
    columns = {}
    for name, block in blocks(scores).items():
        title = f"{BLOCK_NAMES[name]}, {block['n_studies']} studies"
        columns[title, "Score"] = [number(value(block, "scores", model)) for model in models(scores)]
        if block.get("skill"):
            columns[title, "Skill"] = [number(value(block, "skill", model), 2) for model in models(scores)]
        intervals = [value(block, "interval", model) for model in models(scores)]
        columns[title, "95 % interval"] = [" to ".join(map(number, found or [None])) for found in intervals]
    table = pd.DataFrame(columns, index=pd.Index(map(model_name, models(scores)), name="Model"))
    table.columns = pd.MultiIndex.from_tuples(table.columns)
    return table


def parts_table(block: dict[str, Any]) -> pd.DataFrame:
    """Parts of a block's scores as text, with the skill in brackets where there is one: a row a model."""
    columns = {}
    for part in PARTS[:-1]:
        texts = [number(value(block, "scores", model, part)) for model in block["scores"]]
        skills = [value(block, "skill", model, part) for model in block["scores"]]
        both = zip(texts, skills, strict=True)
        columns[PART_NAMES[part]] = [text if skill is None else f"{text} ({number(skill, 2)})" for text, skill in both]
    return pd.DataFrame(columns, index=pd.Index(map(model_name, block["scores"]), name="Model"))


LOCALISATION = {
    "within_5_mm": ("Within 5 mm", "{:.1%}"),
    "within_10_mm": ("Within 10 mm", "{:.1%}"),
    "in_plane_within_5_mm": ("Within 5 mm in plane", "{:.1%}"),
    "sides_exchanged": ("Sides exchanged", "{:.0f}"),
    "level_right": ("Right level", "{:.1%}"),
}


def localisation_tables(found: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Where the detectors found the levels, as text, from localisation.csv: a table a block, a row a condition.

    Columns: shares of points near their place in space and in the image's plane, and how many changed sides. Axial
    slices, a row of their own, count as right where they were given their level. Empty where `found` is.
    """
    tables = {}
    for split, name in BLOCK_NAMES.items() if len(found) else ():
        mine = found[(found["split"] == split) & (found["spines"] == "all")].set_index("condition").replace("", None)
        shown = {
            title: mine[column].astype(float).map(form.format, na_action="ignore")
            for column, (title, form) in LOCALISATION.items()
            if column in mine
        }
        table = pd.DataFrame(shown, dtype=object).fillna("–")
        table.index = pd.Index([text.replace("_", " ").capitalize() for text in mine.index], name="Points")
        if len(table):
            tables[name] = table
    return tables


def experiment_tables(found: dict[str, pd.DataFrame]) -> dict[str, pd.DataFrame]:
    """What experiments round a run showed, as text, from their tables: a heading each, in the order of the tables.

    Scores are the ensemble's totals; what is behind a +/- comes with its paired 95 % interval over studies. A heading
    tells the commit that an experiment was made at, which may be an earlier one than the run's.
    """
    tables = {}
    if "ablation" in found:
        table = found["ablation"]
        shown = {"Out of fold": [number(total) for total in table["total"]]}
        shown["Worse by"] = _differences(table, "worse_by")
        shown |= {PART_NAMES[part]: [number(score) for score in table[part]] for part in PARTS[:3]}
        names = pd.Index(table["without"].fillna("nothing: the run itself"), name="Taken away")
        tables[_heading("What each ingredient is worth", table)] = pd.DataFrame(shown, index=names)
    if "curve" in found:
        columns = {}
        for name, title in BLOCK_NAMES.items():
            table = found["curve"][found["curve"]["block"] == name].set_index("n_train")
            columns[title, "Score"] = table["total"].map(number)
            columns[title, "95 % interval"] = table["low"].map(number) + " to " + table["high"].map(number)
            if "skill" in table:
                columns[title, "Skill"] = table["skill"].map(lambda skill: number(skill, 2))
        shown = pd.DataFrame(columns).fillna("–")
        shown.index = pd.Index([str(n) for n in shown.index], name="Training studies")
        tables[_heading("What more training studies are worth", found["curve"])] = shown
    if "noise" in found:
        table = found["noise"]
        shown = {"Test": [number(total) for total in table["total"]]}
        shown["Skill"] = [number(skill, 2) for skill in table["skill"]]
        shown["Better by"] = _differences(table, "better_by")
        for column, title in {"planted": "Wrong labels", "listed": "Suspects"}.items():
            shown[title] = [number(count, 0) for count in table[column]]
        for column in ("precision", "recall", "precision_at_half"):
            title = column.replace("_at_half", " at recall 0.5").capitalize()
            shown[title] = [number(share, 2) for share in table[column]]
        names = pd.Index(table["labels"].str.capitalize(), name="Training labels")
        tables[_heading("What wrong labels cost, and whether they are found", table)] = pd.DataFrame(shown, index=names)
    return tables


def _heading(title: str, table: pd.DataFrame) -> str:
    """A heading with the commit of its experiment, where the table tells it."""
    return f"{title} (commit {table['commit'].iloc[0][:12]})" if "commit" in table else title


def _differences(table: pd.DataFrame, column: str) -> list[str]:
    """A difference with its interval from the columns `column`, low and high; a dash where there is none."""
    lines = table[[column, "low", "high"]].itertuples(index=False, name=None)
    return ["–" if pd.isna(line[0]) else "{:+.3f} ({:+.3f} to {:+.3f})".format(*line) for line in lines]


def about(run: Run) -> str:
    """What was graded by what, in two sentences for a reader who knows neither data nor models."""
    words = {"oof": "training", "test": "test"}
    sizes = [f"{block['n_studies']} {words[name]}" for name, block in blocks(run.scores).items()]
    kind = {"phantom": "synthetic", "kaggle": "real"}.get(run.data.get("kind", ""), "")
    folds = run.parameters.get("folds", [])
    trained = f", each trained on {len(folds)} folds" if folds else ""
    return (
        f"Magnetic resonance images of {' and '.join(sizes)} {kind} studies of the lumbar spine were graded at five "
        "levels for narrowing of the spinal canal, of both neural foramina and of both subarticular recesses: normal "
        "or mild, moderate, severe. Three YOLOv10 detectors, one a condition, and a 3D vision transformer"
        f"{trained}, grade every row; a blend fitted out of fold joins them."
    )


def summary(scores: dict[str, Any]) -> list[str]:
    """What the scores say, as sentences computed from them."""
    sentences = [_sentence(name, block) for name, block in blocks(scores).items() if value(block, "scores", "ensemble")]
    sentences += _no_better_than_counting(scores["oof"])
    sentences += stress_sentences(scores)
    if not scores.get("test"):
        sentences.append("The test studies of this data have no labels, so the out-of-fold score is the result.")
    return sentences


def _sentence(name: str, block: dict[str, Any]) -> str:
    """The ensemble's total of one block, beside prior and oracle."""
    ensemble = number(value(block, "scores", "ensemble"))
    low_high = value(block, "interval", "ensemble")
    within = f" (95 % interval {' to '.join(map(number, low_high))})" if low_high else ""
    prior = number(value(block, "scores", "prior"))
    text = f"{BLOCK_NAMES[name]}, on {block['n_studies']} studies, the ensemble scores {ensemble}{within}"
    text += f"; counting labels gives {prior}"
    if block.get("skill"):
        oracle, skill = number(value(block, "scores", "oracle")), number(value(block, "skill", "ensemble"), 2)
        text += f" and the limit of the labels is {oracle}, so its skill is {skill}"
    return f"{text}. Lower scores are better."


def _no_better_than_counting(block: dict[str, Any]) -> Iterator[str]:
    """A sentence for each model whose total is no better than the prior's."""
    prior = value(block, "scores", "prior")
    for model in ("yolo", "vit3d", "ensemble"):
        total = value(block, "scores", model)
        if prior is not None and total is not None and total >= prior:
            yield f"{model_name(model)}: no better than counting labels at this budget, out of fold."


def stress_sentences(scores: dict[str, Any]) -> Iterator[str]:
    """A sentence on the stress tests, as far as they told something."""
    numbers = scores.get("stress") or {}
    words = {
        "slope": "at the cut-offs its answer rises {:.2f} times as steeply as the oracle's",
        "leak": "while one place narrows, another row's probability of moderate or worse moves by up to {:.2f}",
        "looked": "{:.0%} of what hiding changes in the transformer's answer lies within 10 mm of the place",
        "moved": "what must not matter moves a probability by at most {:.1e}",
    }
    told = [text.format(numbers[name]) for name, text in words.items() if numbers.get(name) is not None]
    if told:
        yield f"Under stress tests of the ensemble, {'; '.join(told)}."


# ---- rows ---------------------------------------------------------------------------------------------------------


def labelled_rows(run: Run) -> pd.DataFrame:
    """Out-of-fold rows of the ensemble with their label: row_id, three natural probabilities, condition, severity."""
    if run.rows.empty or run.labels.empty:
        return pd.DataFrame()
    labels = run.labels.loc[run.labels["severity"] != MISSING, ["row_id", "condition", "severity"]]
    return run.rows.merge(labels, on="row_id")
