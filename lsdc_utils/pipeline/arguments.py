"""Arguments of ./run_all.sh; standard library only, since --help and wrong options are answered before any set-up.
`python -m lsdc_utils.pipeline.arguments WORD ...` exits with 0 after --help, 2 after an error, 3 if all is well."""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from functools import partial
from pathlib import Path

OUTPUTS = Path(__file__).resolve().parents[2] / "outputs"
READY = "pretrained"  # folder in outputs/ of the ready-made models
RESERVED = ("data", "sample", READY, "predict", "evaluation")  # names in outputs/ that no run may have


class UsageError(ValueError):
    """The command cannot be carried out as asked; the message says why and what is possible."""


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one sentence and the way to the help."""

    def error(self, message: str) -> None:
        """Print the error and exit with status 2."""
        self.exit(2, f"run_all.sh: {message}\nhelp: {self.prog} --help\n")


def existing(kind: str, text: str) -> Path:
    """An existing folder or file, as `kind` says."""
    if not (Path(text).is_dir() if kind == "folder" else Path(text).is_file()):
        raise argparse.ArgumentTypeError(f"{text}: no such {kind}")
    return Path(text)


def at_least_one(text: str) -> int:
    """A whole number, 1 or more."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected a whole number, 1 or more")
    return int(text)


def run_name(text: str) -> str:
    """A name that a new run may have."""
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", text) or text in RESERVED:
        raise argparse.ArgumentTypeError(f"{text}: expected a plain name, not {' or '.join(RESERVED)}")
    return text


def finished_run(name: str) -> Path:
    """The folder of a finished run."""
    if not (OUTPUTS / name / "scores.json").is_file():
        raise argparse.ArgumentTypeError(f"{name}: no such finished run; create it with ./run_all.sh --run {name}")
    return OUTPUTS / name


def override(text: str) -> str:
    """A parameter as KEY=VALUE, not a command that is spelt wrong."""
    if "=" not in text:
        raise argparse.ArgumentTypeError(f"{text}: no command, and not KEY=VALUE; commands: {', '.join(COMMANDS)}")
    return text


COMMANDS = {  # name: arguments as shown in --help, what it does
    "run": ("[KEY=VALUE ...]", "run the pipeline, only steps that are not up to date; the default command"),
    "validate": ("DIR", "check a data folder; print findings; exit 1 if it cannot be used"),
    "predict": ("DIR [--run NAME]", "grade the studies of a folder with the ready-made models, a run or an archive"),
    "evaluate": ("DIR [--run NAME]", "grade the labelled studies of a folder and score the grades"),
    "adapt": ("DIR --out NAME", "fit a finished run to the population of a labelled folder: a new run"),
    "export": ("[STUDY ...]", "export grades of a finished run as CSV and DICOM SR, one folder per study"),
    "pack": ("", "pack the models of a finished run into one archive, for predict on another machine"),
    "kaggle-bundle": ("", "write a data set and a notebook that grade the hidden studies on Kaggle"),
    "ablate": ("[NAME ...]", "run the ablations of a finished run: remove one part at a time, compare scores"),
    "curve": ("[N ...]", "learning curve: repeat a finished run on a phantom with N training studies each"),
    "refine": ("", "train a run's transformers again, on labels softened by other models' predictions"),
    "bench": ("[NAME]", "measure the speed of reading, conversion, crops and training, and memory"),
    "test": ("[--all]", "run the tests"),
    "lab": ("[OPTION ...]", "open JupyterLab at the start page; options are passed on to JupyterLab"),
}
NOTES = {  # at the end of a command's --help
    "run": "a step is named by notebook (03_train_yolo), number (03) or in full (03_train_yolo_scs_fold0)",
    "kaggle-bundle": "needs the network: pip downloads wheels that Kaggle's image lacks; wheels already there are kept",
}
SWITCH, EITHER = {"action": "store_true"}, {"action": argparse.BooleanOptionalAction, "default": None}
FOLDER, FILE = ({"type": partial(existing, kind)} for kind in ("folder", "file"))
OVERRIDES = {"type": override, "nargs": "*"}
FINISHED, COUNT = {"default": "demo", "type": finished_run}, {"type": at_least_one}
OPTIONS = (  # commands, name, metavar, help, other settings of argparse
    ("run", "overrides", "KEY=VALUE", "a parameter of notebooks/profiles/demo.yml, e.g. folds=0", OVERRIDES),
    ("validate predict evaluate adapt", "folder", "DIR", "competition's layout, or DICOM files", FOLDER),
    ("export", "studies", "STUDY", "study ids (default: the test studies)", {"type": int, "nargs": "*"}),
    ("ablate", "names", "NAME", "only these of notebooks/ablations.yml", {"nargs": "*"}),
    ("curve", "sizes", "N", "training studies (default: 40 80 160 320)", COUNT | {"nargs": "*"}),
    ("refine", "--run", "NAME", "a finished run (default: demo); the new one is NAME-refined", FINISHED),
    ("bench", "name", "NAME", "only benchmarks with this in their name", {"nargs": "?", "default": ""}),
    ("test", "--all", None, "the slow tests too", SWITCH),
    ("run", "--profile", "PROFILE", "values in notebooks/profiles/PROFILE.yml (default: demo)", {"default": "demo"}),
    ("run", "--data", "DIR", "a data folder (default: the profile's; demo draws a phantom)", FOLDER),
    ("run", "--run", "NAME", "results go to outputs/NAME (default: the profile's name)", {"type": run_name}),
    ("predict evaluate", "--run", "NAME", f"a run or `pack`'s archive (default: outputs/{READY})", {"default": READY}),
    ("adapt export pack kaggle-bundle ablate curve", "--run", "NAME", "a finished run (default: demo)", FINISHED),
    ("validate", "--out", "FILE", "also write the findings to this csv", {"type": Path}),
    ("predict", "--out", "DIR", "where grades go (default: outputs/[NAME/]predict/<folder>)", {"type": Path}),
    ("evaluate", "--out", "DIR", "where results go (default: outputs/[NAME/]evaluation/<folder>)", {"type": Path}),
    ("adapt", "--out", "NAME", "name of the new run", {"type": run_name, "required": True}),
    ("adapt", "--train", None, "also train its models on the studies, beginning with the run's weights", SWITCH),
    ("evaluate adapt", "--labels", "CSV", "a table of grades (default: train.csv or solution.csv)", FILE),
    ("evaluate", "--allow-trained", None, "score studies that the models were trained on, marked so", SWITCH),
    ("predict", "--pages", None, "a page per study (default: up to 20 studies)", EITHER),
    ("export", "--out", "DIR", "where they go (default: outputs/NAME/exports)", {"type": Path}),
    ("pack", "--out", "FILE", "the archive (default: outputs/NAME/NAME.zip)", {"type": Path}),
    ("pack", "--ready", None, "write outputs/pretrained instead: 16-bit weights, tempered blend", SWITCH),
    ("pack", "--measured", "CSV", "with --ready: a table of results on real scans, shown in the card", FILE),
    ("kaggle-bundle", "--out", "DIR", "where they go (default: outputs/NAME/kaggle)", {"type": Path}),
    ("kaggle-bundle", "--user", "NAME", "your name on Kaggle (default: the one in ~/.kaggle/kaggle.json)", {}),
    ("run predict evaluate adapt ablate curve refine", "--cores", "N", "cores (default: all)", COUNT),
    ("run", "--until", "STEP", "stop after this step, notebook (04) or fold of it (04_fold0)", {}),
    ("run", "--force", "STEP", "re-run this step and what depends on it", {"action": "append", "default": []}),
    ("run", "--slurm", None, "submit each step as a job to SLURM, see notebooks/profiles/slurm/", SWITCH),
    ("run", "--dry-run", None, "list the steps that would run, and why", SWITCH),
)


def parse(words: list[str]) -> argparse.Namespace:
    """The arguments, with `command`, `typed` and, for lab, `rest`; exits on --help (status 0) and on errors (2)."""
    named, typed = bool(words) and words[0] in COMMANDS, shlex.join(["./run_all.sh", *words])
    name, words = (words[0], words[1:]) if named else ("run", words)
    note, does = NOTES.get(name, ""), COMMANDS[name][1]
    if not named:  # --help lists all commands
        lines = [f"  {f'{word} {given}':24} {what}" for word, (given, what) in COMMANDS.items()]
        note = "\n".join(["commands, each with its own --help:", *lines, "", note])
    form = argparse.RawDescriptionHelpFormatter
    program = f"./run_all.sh {name}" if named else "./run_all.sh"
    parser = Parser(program, description=f"{does[0].upper()}{does[1:]}.", epilog=note, formatter_class=form)
    for takers, option, metavar, text, settings in OPTIONS:
        if name in takers.split():
            parser.add_argument(option, help=text, **({"metavar": metavar} if metavar else {}), **settings)
    asked, rest = parser.parse_known_args(words) if name == "lab" else (parser.parse_intermixed_args(words), [])
    return argparse.Namespace(**vars(asked), command=name, typed=typed, rest=rest)


if __name__ == "__main__":
    parse(sys.argv[1:])
    sys.exit(3)
