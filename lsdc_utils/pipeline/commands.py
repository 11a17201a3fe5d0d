"""The commands of ./run_all.sh: `python -m lsdc_utils.pipeline.commands WORD ...`. Each is a function that returns the
exit status; arguments.COMMANDS says what it does."""

import errno
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

from lsdc_utils.files import count_studies, git_commit
from lsdc_utils.parallel import usable_cores
from lsdc_utils.pipeline import arguments
from lsdc_utils.pipeline.arguments import OUTPUTS, READY, RESERVED, UsageError
from lsdc_utils.pipeline.graph import NOTEBOOKS, ROOT, member_parameters, read_parameters, select_steps
from lsdc_utils.pipeline.parameters import BORROWED, check_start, load_parameters, resolve_conditions
from lsdc_utils.pipeline.progress import clock, score_table, shown
from lsdc_utils.pipeline.run import Run, dry_run, locked, visible_gpus, work
from lsdc_utils.vocabulary import GROUPS

BENCHMARKS = ROOT / "tests" / "benchmarks"
DENIED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EISDIR, errno.ENOTDIR, errno.EEXIST)
OWN = {  # what a command deletes in its folder of results, and what shows that it wrote it
    "predict": (("submission.csv", "grades.csv", "findings.csv", "pages"), ("tables/listed.json",)),
    "evaluation": (("evaluation.json", "report", "work", "logs"), ("about.json", "work/tables", "work/models")),
}
EXPLAINED = ("UsageError", "RunError", "ExportError", "CompetitionError")  # by their message; loaded when used
# The filter of `lab`, run by git with the top of the tree as its folder: in the environment that is there then.
FILTER = """for python in "$0" .venv/bin/python python python3; do
"$python" -c "import nbstripout" 2>/dev/null && exec "$python" -m nbstripout "$@"; done
echo "no Python with nbstripout: outputs of notebooks are kept; run_all.sh lab repairs this" >&2; exec cat"""
NBSTRIPOUT_KEYS = "metadata.papermill cell.metadata.papermill cell.metadata.execution"


def run_of(asked: Namespace) -> Run:
    """The run that the arguments describe; UsageError if they are wrong."""
    parameters = load_parameters(asked.profile, asked.overrides)
    name = asked.run or (f"{READY}-run" if asked.profile == READY else asked.profile)  # outputs/READY is pack's
    cores = asked.cores or usable_cores()
    resume = ["./run_all.sh", "--profile", asked.profile, "--run", name, "--cores", str(cores), *asked.overrides]
    if asked.data:
        parameters["data_dir"] = str(asked.data.resolve())
        resume += ["--data", parameters["data_dir"]]
    resolve_conditions(parameters)
    check_start(parameters)
    resume += [*(["--until", asked.until] if asked.until else []), *["--slurm"] * asked.slurm]
    run = Run(OUTPUTS / name, parameters, shlex.join(resume), cores, asked.until, asked.force, slurm=asked.slurm)
    for step in filter(None, [*asked.force, asked.until]):
        select_steps(run.steps, step)
    return run


def run(asked: Namespace) -> int:
    """Run what is not up to date and print scores and the report's path, or list what would run."""
    planned, began = run_of(asked), time.time()
    if asked.dry_run and (folder := planned.parameters["data_dir"]):
        from lsdc_utils.checkpoint import points_source
        from lsdc_utils.data import checks, competition

        exclude, points, lender = map(planned.parameters.get, ("exclude_csv", "points_csv", "points_from"))
        comp = competition.read(folder, exclude, points, planned.cores)
        labels, source = checks.label_table(comp, planned.cores), points_source(planned.folder, lender)
        groups = checks.wanted(labels, planned.parameters["conditions"], lender)[0]
        if fault := checks.untrainable(labels, groups, lender, source, comp.series["series_type"]):
            raise UsageError(f"{folder}: {fault}; ./run_all.sh validate tells more")  # as 02 would
    if asked.dry_run:
        return dry_run(planned)
    check_weights(planned)
    return finish(planned, began)


def check_weights(planned: Run) -> None:
    """UsageError where a new run would stop in its first trainings, for want of pretrained weights."""
    own, names = planned.parameters, []
    if planned.reaches("03_train_yolo") and not any(map(own.get, BORROWED)):
        names += [name for name in [own.get("yolo_model", "")] if not name.endswith(".yaml")]
    if planned.reaches("04_train_vit3d"):
        members = (own | member_parameters(member, own) for member in own["vit_members"] or [{}])
        names += [member.get("vit_encoder_weights") for member in members]
    if not any(names) or own["fetch_weights"] or (planned.folder / "weights").is_dir():
        return
    from lsdc_utils.downloads import cache

    places = {name: (NOTEBOOKS / os.path.expanduser(name), cache() / os.path.basename(name)) for name in names if name}
    if missing := [name for name, files in places.items() if not any(file.is_file() for file in files)]:
        ways = f"Put them into notebooks/ or {cache()}, or download them once with fetch_weights=true"
        raise UsageError(f"there are no pretrained weights {', '.join(missing)}. {ways}")


def finish(planned: Run, began: float) -> int:
    """Do what is not up to date; print the scores and report that are of it, not of an earlier start. began: when."""
    with locked(planned.folder):
        if status := work(planned):
            return status
    if planned.reaches("05_ensemble_inference"):
        print(score_table(json.loads((planned.folder / "scores.json").read_text())))
    if planned.reaches("08_report"):
        print(f"\nreport: {planned.folder / 'report' / 'index.html'}")
    print(f"the run took {clock(time.time() - began)}")
    return 0


def validate(asked: Namespace) -> int:
    """Check a data folder; 0 if it can be used, else 1."""
    from lsdc_utils.data import checks

    ids = asked.out and asked.out.parent / "study_ids.csv"
    if ids and ids.exists() and not asked.out.exists():  # not of an earlier check
        raise UsageError(f"--out {asked.out}: {ids} would be replaced: name another folder")
    return checks.main(asked.folder.resolve(), asked.out, source=OUTPUTS / READY)


def grading(asked: Namespace, kind: str) -> tuple[Path, Path, str]:
    """The folder or archive of the models, the folder of results, and the models' name; UsageError if one is wrong."""
    archive, ready = asked.run.endswith(".zip"), asked.run == READY
    folder, name = asked.folder.resolve(), Path(asked.run).stem if archive else asked.run
    trained = Path(asked.run) if archive else OUTPUTS / name
    kept = OUTPUTS if name in RESERVED else OUTPUTS / name  # what lies there is committed
    out = (asked.out or kept / kind / folder.name).resolve()
    if archive and not trained.is_file():
        raise UsageError(f"--run {asked.run}: no such file")
    if not archive and not ready and not trained.is_dir():
        runs = ", ".join(sorted(path.parent.name for path in OUTPUTS.glob("*/blend.json"))) or "none yet"
        raise UsageError(f"--run {asked.run}: no such run; finished runs: {runs}")
    if out.exists() and not out.is_dir():
        raise UsageError(f"--out {asked.out}: is a file, expected a folder")
    held, ours = ([name for name in names if (out / name).exists()] for names in OWN[kind])
    places = {f"inside {asked.folder}": out.is_relative_to(folder), "a run's own folder": (out / "weights").is_dir()}
    places |= {f"which holds another {name}": not ours for name in held}
    if wrong := next(filter(places.get, places), ""):
        raise UsageError(f"grades would go to {shown(out)}, {wrong}: give another folder with --out")
    return trained, out, name


def models_in(trained: Path, unpacked: Path) -> Path:
    """The folder of the models, of an archive where it is unpacked; UsageError where they cannot be used."""
    from lsdc_utils.pipeline import pack

    if trained.suffix == ".zip":
        return pack.unpack(trained, unpacked)
    if trained == OUTPUTS / READY:
        pack.check_ready(trained)
    return trained.resolve()


def predict(asked: Namespace) -> int:
    """Grade every study in a folder with a run, an archive or the ready-made models."""
    (trained, out, name), folder = grading(asked, "predict"), asked.folder.resolve()
    from lsdc_utils.grading.basis import grade_basis
    from lsdc_utils.pipeline import predict

    began, cores = time.time(), asked.cores or usable_cores()
    with locked(out):
        trained = models_in(trained, out / "models")
        parameters = predict.prepare(folder, trained, out, cores)
        if status := work(Run(out, parameters, asked.typed, cores, snakefile="predict.smk")):
            return status
        basis = grade_basis(trained)
        summary, studies, uncertain = predict.collect(parameters, basis)
        print(f"\n{summary}\n\ngrades: {out}/grades.csv")
        if pages := asked.pages or (asked.pages is None and studies <= predict.FEW_PAGES):
            print(f"pages: {predict.write_pages(parameters, name, basis)}")
    place = f"{cores} cores" if not (gpus := len(visible_gpus())) else f"{gpus} GPU{'s' * (gpus > 1)}"
    check = ": check these on their pages" if pages and uncertain else ""
    print(f"{count_studies(studies)} in {time.time() - began:.0f} s on {place}; levels uncertain in {uncertain}{check}")
    return 0


def evaluate(asked: Namespace) -> int:
    """Grade the labelled studies of a folder and score the grades."""
    (trained, out, name), cores = grading(asked, "evaluation"), asked.cores or usable_cores()
    from lsdc_utils.pipeline import labelled

    found = labelled.find(asked.folder.resolve(), asked.labels, cores)
    with locked(out):
        trained = models_in(trained, out / "work" / "models")
        overlap = labelled.check_overlap(found, trained, asked.allow_trained, cores)
        numbers = labelled.evaluate(found, trained, out, name, overlap, cores, asked.typed)
    print(score_table(numbers).replace(" test stud", " labelled stud"))
    print("", *numbers["notes"], "", f"numbers: {out}/evaluation.json", f"report: {out}/report/index.html", sep="\n")
    return 0


def adapt(asked: Namespace) -> int:
    """Fit a finished run to the population of a labelled folder."""
    from lsdc_utils import metric
    from lsdc_utils.pipeline import adapt, labelled

    out, cores, began = OUTPUTS / asked.out, asked.cores or usable_cores(), time.time()
    if asked.run.name == asked.out or (not asked.train and (out / "weights").is_dir()):
        raise UsageError(f"--out {asked.out}: there is such a run; give another name, or delete {shown(out)}")
    if asked.train and asked.labels:
        raise UsageError("adapt: --labels cannot be used with --train, which reads train.csv")
    found = labelled.find(asked.folder.resolve(), asked.labels, cores)
    adapt.check(found, asked.run, cores)
    if asked.train:
        parameters = adapt.training_parameters(found, asked.run)
        known = read_parameters(out) if (out / "parameters.yml").is_file() else parameters
        if any(known.get(key) != parameters[key] for key in ("start_from", "data_dir")):
            raise UsageError(f"--out {asked.out}: there is another run; give another name, or delete {shown(out)}")
        resolve_conditions(parameters)
        check_start(parameters)
        return finish(Run(out, parameters, asked.typed, cores), began)
    with locked(out):
        about = adapt.adapt_run(found, asked.run, out, cores, asked.typed)
    print(score_table(json.loads((out / "scores.json").read_text())))
    kept = ", ".join(group.score for key, group in GROUPS.items() if key not in about["changed"]) or "none"
    before = about["before"][metric.overall(about["before"])]
    print(f"\nensemble by the run's own blend: {before:.3f}; kept as it is: {kept}\nrun: {shown(out)}")
    return 0


def export(asked: Namespace) -> int:
    """Write grades of a finished run for other systems."""
    from lsdc_utils.export import studies

    out = (asked.out or asked.run / "exports").resolve()
    written = studies.export_studies(asked.run, asked.studies or None, out)
    for study, problem in written.loc[written["problem"] != "", ["study_id", "problem"]].to_numpy():
        print(f"study {study}: {problem}", file=sys.stderr)
    print(f"{count_studies(len(written))} exported to {shown(out)}, with {written['images_written'].sum()} key images")
    return int((written["images_referred"] == 0).any())  # of these no sr.dcm was written


def _place(run: Path) -> Path:
    """Where something made from a run goes by default: into its folder. UsageError for the ready-made models, which
    hold their own files alone."""
    if run == OUTPUTS / READY:
        raise UsageError(f"--run {READY}: tell with --out where it goes; {shown(run)} holds its own files alone")
    return run


def pack(asked: Namespace) -> int:
    """Pack the models of a finished run."""
    from lsdc_utils.pipeline.pack import pack_ready, pack_run

    if (asked.out and asked.ready) or (asked.measured and not asked.ready):
        raise UsageError("pack: --out cannot be used with --ready, and --measured needs --ready")
    if asked.ready:
        table = pack_ready(asked.run, OUTPUTS / READY, asked.measured, usable_cores())
        print(f"{table.to_string(index=False)}\nready-made models: {shown(OUTPUTS / READY)}")
        return 0
    out = (asked.out or _place(asked.run) / f"{asked.run.name}.zip").resolve()
    if out.suffix != ".zip":
        raise UsageError(f"--out {asked.out}: expected a name that ends in .zip")
    names = pack_run(asked.run, out)
    print(f"{shown(out)}: {len(names)} files, {out.stat().st_size / 2**20:.0f} MiB")
    return 0


def kaggle_bundle(asked: Namespace) -> int:
    """Write what grades the hidden studies on Kaggle."""
    from lsdc_utils.pipeline import kaggle

    out, user = (asked.out or _place(asked.run) / "kaggle").resolve(), asked.user or kaggle.user_here()
    wheels = kaggle.write_bundle(asked.run, out, user)
    print(f"{shown(out)}: models, package and {len(wheels)} wheels. Upload them with\n")
    print(f"  kaggle datasets create -p {shown(out / 'dataset')} --dir-mode zip")
    print(f"  kaggle kernels push -p {shown(out / 'notebook')}")
    if user == kaggle.USER:
        print(f"\nReplace {user} by your name on Kaggle in the metadata of both folders, or give it with --user.")
    return 0


def experiment(asked: Namespace) -> int:
    """Repeat a run without some of its parts, on fewer studies, or on softened labels."""
    from lsdc_utils.pipeline import experiments

    cores = asked.cores or usable_cores()
    if asked.run == OUTPUTS / READY or not (asked.run / "parameters.yml").is_file():
        raise UsageError(f"--run {asked.run.name}: was not made here by ./run_all.sh, and so cannot be repeated")
    if asked.command == "ablate":
        return experiments.run_ablations(asked.run, asked.names, cores)
    if asked.command == "curve":
        return experiments.run_curve(asked.run, asked.sizes or [40, 80, 160, 320], cores)
    return experiments.run_refined(asked.run, cores)


ablate = curve = refine = experiment


def bench(asked: Namespace) -> int:
    """Run a benchmark of tests/benchmarks."""
    benchmarks = sorted(path for path in BENCHMARKS.glob("*.py") if "__main__" in path.read_text())
    scripts = [path for path in benchmarks if asked.name in path.stem]
    if not scripts:
        raise UsageError(f"no benchmark {asked.name!r}; there are: {', '.join(path.stem for path in benchmarks)}")
    status = 0
    for script in scripts:
        print(f"\n{script.stem}", flush=True)
        if subprocess.run([sys.executable, script], cwd=ROOT).returncode:
            status = 1
            print(f"failed: {script.stem}", file=sys.stderr)
    return status


def test(asked: Namespace) -> int:
    """Run the tests; without --all not those that take minutes each."""
    processes = min(usable_cores() + 1, 4)  # tests wait for runs; each takes some GiB, and those of a file share one
    command = [sys.executable, "-m", "pytest", "-n", str(processes), "--dist", "loadfile", "--no-loadscope-reorder"]
    return subprocess.run(command + ([] if asked.all else ["-m", "not slow"]), cwd=ROOT).returncode


def lab(asked: Namespace) -> int:
    """Open JupyterLab in notebooks/, after installing the filter that keeps notebooks' outputs out of git."""
    clean = shlex.join(["sh", "-c", FILTER, sys.executable, "--keep-id", "--extra-keys", NBSTRIPOUT_KEYS])
    clean = clean.replace("%", "%%")  # which git fills in
    if git_commit() == "unknown":  # in a repository around this tree it would be the filter of that
        print("not a git clone: the filter for notebooks is not installed", file=sys.stderr)
    else:
        for key, value in {"clean": clean, "smudge": "cat", "required": "true"}.items():
            subprocess.run(["git", "-C", ROOT, "config", f"filter.nbstripout.{key}", value], check=True)
    settings = "default_url=/lab/tree/start.ipynb news_url=None check_for_updates_class=jupyterlab.NeverCheckForUpdate"
    options = [f"--notebook-dir={NOTEBOOKS}", *(f"--LabApp.{setting}" for setting in settings.split())]
    as_root = ["--allow-root"] * (os.geteuid() == 0)
    return subprocess.run([sys.executable, "-m", "jupyterlab", *options, *as_root, *asked.rest]).returncode


def main(words: list[str]) -> int:
    """Parse the arguments and carry out the command; the exit status."""
    asked = arguments.parse(words)
    try:
        return globals()[asked.command.replace("-", "_")](asked)
    except ValueError as error:
        if type(error).__name__ not in EXPLAINED:
            raise
        print(f"run_all.sh: {error}", file=sys.stderr)
    except OSError as error:
        if error.errno not in DENIED or error.filename is None:
            raise
        what = f"{error.filename2 or error.filename}: {error.strerror}"
        print(f"run_all.sh: {what}; allow this user to write there, or name another folder", file=sys.stderr)
    except KeyboardInterrupt:
        print("run_all.sh: stopped; the same command resumes", file=sys.stderr)
        return 130  # as shells report it
    return 2


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # which raises KeyboardInterrupt
    sys.exit(main(sys.argv[1:]))
