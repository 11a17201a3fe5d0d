"""Every command of README and docs, run in small: `python tests/proofs/docs.py [--folder DIR]`.

HEAD is cloned into a folder with a space in its name, beside small folders of studies. Each command of a page is run
there, as `COMMANDS` says, or is listed with the reason of `NOT_RUN`. The list of what was run, with exit status and
seconds, is printed and written to docs/commands.csv. The proof fails where a command fails or lacks its expected words,
where a page has a command that these tables lack, and where they have one that no page has. Takes half an hour or more.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pandas as pd

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from lsdc_utils import phantom  # noqa: E402

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SETTING = 'settings["shear"] = 5.0'  # not a command, but a line for a cell: it is put there
SUBSTITUTES = {  # word of the docs -> what stands in for it; paths are relative to the clone
    "DIR": "'../some studies'",  # three of a phantom, in the competition's layout
    "FILE.csv": "'../some studies/train.csv'",
    "TWENTY": "'../twenty studies'",  # the fewest that adapt takes
}
TWO = "'vit_members=[{name: small}, {name: wide, pooling: gru, squares: [[32, 32, 3], [64, 32, 2]]}]'"
SMALL = "--profile smoke folds=0 stress_bodies=0"  # one fold of the smallest studies, without stress tests
COMMANDS = {  # command of the docs -> what is run ("": the same; SMALL: the above), and words that it must print
    "./run_all.sh": ("./run_all.sh SMALL --run demo", r"report: .*/outputs/demo/report/index\.html"),
    "./run_all.sh --help": ("", "commands, each with its own --help"),
    "./run_all.sh lab": ("./run_all.sh lab --no-browser --port 0", "answers"),
    "./run_all.sh --run softmax vit_head=softmax": (
        "./run_all.sh SMALL --run softmax --until 04_train_vit3d vit_head=softmax",
        "04_train_vit3d_fold0 done",
    ),
    "./run_all.sh --run resnet vit_encoder=resnet18": (  # only 04 differs from the run above
        "./run_all.sh SMALL --run softmax --until 04_train_vit3d vit_encoder=resnet18",
        "04_train_vit3d_fold0 done",
    ),
    SETTING: ("", "written into 03_train_yolo"),
    "./run_all.sh --dry-run": ("./run_all.sh SMALL --run demo --dry-run", "03_train_yolo_scs_fold0"),
    "./run_all.sh 'yolo_epochs={nfn: 5}' folds=0,1 --dry-run": ("", "03_train_yolo_nfn_fold0"),
    "./run_all.sh --profile kaggle --data DIR folds=0 fetch_weights=true": (
        "./run_all.sh --profile kaggle --data DIR --dry-run folds=0 fetch_weights=true",
        "03_train_yolo_nfn_fold0",
    ),
    "./run_all.sh --profile kaggle --run first --data DIR folds=0 fetch_weights=true pretrain_phantom=500": (
        "./run_all.sh --profile kaggle --run first --data DIR --dry-run folds=0 pretrain_phantom=500",
        r"first outputs/on-phantom-\w+, on phantom studies",
    ),
    "./run_all.sh validate DIR": ("", "usable for: "),
    "./run_all.sh validate DIR [--out findings.csv]": (
        "./run_all.sh validate DIR --out ../findings.csv",
        "usable for: ",
    ),
    "./run_all.sh predict DIR": ("", "pages: "),
    "./run_all.sh predict DIR [--out DIR] [--no-pages]": (
        "./run_all.sh predict DIR --out ../grades --no-pages",
        "grades: .*/grades/grades.csv",
    ),
    "./run_all.sh predict DIR --run demo": ("", "outputs/demo/predict/some studies/grades.csv"),
    "./run_all.sh predict DIR --run demo.zip": ("./run_all.sh predict DIR --run outputs/demo/demo.zip", "grades: "),
    "./run_all.sh evaluate DIR --run demo --labels FILE.csv": ("", "numbers: "),
    "./run_all.sh evaluate DIR [--run NAME|FILE.zip] [--labels FILE.csv] [--out DIR] [--allow-trained]": (
        "./run_all.sh evaluate DIR --run demo --labels FILE.csv --out ../evaluation --allow-trained",
        "numbers: .*/evaluation/evaluation.json",
    ),
    "./run_all.sh adapt DIR --run demo --out NAME": ("./run_all.sh adapt TWENTY --run demo --out adapted", "run: "),
    "./run_all.sh adapt DIR --run demo --out NAME --train": (
        "./run_all.sh adapt TWENTY --run demo --out trained-further --train || true",  # by models that name few levels
        "report: |no study to train the transformer on; 0 of",
    ),
    "./run_all.sh export --run demo [STUDY ...] [--out DIR]": (
        "./run_all.sh export --run demo --out ../exports",
        "3 studies exported",
    ),
    "./run_all.sh pack --run demo": ("", "demo.zip: .* files"),
    "./run_all.sh --profile pretrained": ("./run_all.sh --profile pretrained --dry-run", "04_train_vit3d_fold0"),
    "./run_all.sh --profile original": ("./run_all.sh --profile original --dry-run", "04_train_vit3d_fold0"),
    "./run_all.sh --run mine --data DIR": (
        "./run_all.sh SMALL --run mine --until 02_convert_labels --data TWENTY",
        "02_convert_labels done|every step is up to date",
    ),
    "./run_all.sh --run mine --data DIR conditions=nfn,ss": (
        "./run_all.sh SMALL --run mine --until 02_convert_labels --data TWENTY conditions=nfn,ss",
        "02_convert_labels done",
    ),
    "./run_all.sh --force 00": ("./run_all.sh SMALL --run softmax --force 00 --until 00_get_data", "00_get_data done"),
    "./run_all.sh ablate [NAME ...]": ("./run_all.sh ablate one_crop_view", "worse_by"),
    "./run_all.sh curve [N ...]": ("./run_all.sh curve 10", "n_train"),
    "./run_all.sh refine [--run NAME]": ("./run_all.sh refine", "unrefined"),
    "./run_all.sh refine --run demo": ("", "unrefined"),
    "./run_all.sh bench training": ("", "bench_training"),
    f"./run_all.sh --run two {TWO}": (
        f"./run_all.sh SMALL --run softmax --until 04_train_vit3d {TWO}",
        "04_train_vit3d-wide_fold0 done",
    ),
    ".venv/bin/python -m lsdc_utils.report results --run demo": ("", "results of run demo written"),
    ".venv/bin/python -m lsdc_utils.report sample --run demo": ("", "sample of run demo written"),
    "python tests/benchmarks/bench_training.py kaggle": (
        "python tests/benchmarks/bench_training.py smoke --count",
        "TFLOP",
    ),
    "python tests/proofs/rehearsal.py": ("python tests/proofs/rehearsal.py --help", "usage: "),
    "python tests/proofs/members.py": ("python tests/proofs/members.py --help", "usage: "),
    "python tests/proofs/numbering.py CACHE": ("python tests/proofs/numbering.py --help", "usage: "),
    "python tests/house.py": ("", "package"),
    "python tests/proofs/adapt.py CACHE": ("python tests/proofs/adapt.py --help", "usage: "),
    "python tests/proofs/doses.py outputs/demo": ("python tests/proofs/doses.py --help", "usage: "),
    "python tests/proofs/reproduce.py --list": ("python tests/proofs/reproduce.py --help", "usage: "),
    "python tests/proofs/localiser.py": ("python tests/proofs/localiser.py --help", "usage: "),
}
NOT_RUN = {  # command of the docs -> why it is not run here
    "./run_all.sh test": "the build machine runs it on every change",
    "./run_all.sh test --all": "kills runs and fills disks for hours; is run by hand",
    "./run_all.sh pack --ready --run pretrained-run --measured real.csv": "needs the run of profile pretrained",
    "./run_all.sh kaggle-bundle --run kaggle --user NAME": "downloads wheels, needs a run on the real data",
    "apt install python3-venv": "installs on the machine",
    "conda env create --file environment.yml && conda activate lsdc": "downloads the environment",
    "kaggle datasets create -p outputs/kaggle/kaggle/dataset --dir-mode zip": "needs an account",
    "kaggle kernels push -p outputs/kaggle/kaggle/notebook": "needs an account",
    "pip install -r requirements-proofs.txt": "downloads",
    "pip-audit --requirement requirements.txt --no-deps": "asks a database on the network",
    "python tests/proofs/docs.py": "this proof",
    "python tests/proofs/kaggle.py outputs/demo": "downloads an environment",
    "python tests/proofs/lab.py RUN": "a proof of its own, with a browser",
    "python tests/proofs/members.py 112 --also strong mixup coarse slices": "trains for an hour; is run by hand",
    "python tests/proofs/one_group.py DIR": "trains for most of an hour; is run by hand",
    "python tests/proofs/reproduce.py": "trains for a night; is run by hand",
    "python tests/proofs/reproduce.py seed53 seed54": "trains for most of an hour; is run by hand",
    "python tests/proofs/robust.py": "kills runs and fills disks for hours; is run by hand",
    "python tests/proofs/spider.py DIR [--run RUN] [--out CSV]": "needs the SPIDER data set",
    "python tests/proofs/spider.py SPIDER --run pretrained-run --out real.csv": "needs the SPIDER data set",
    "tests/proofs/slurm.sh": "needs root and SLURM",
}
FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`((?:(?:python|pip|pip-audit|conda|apt|kaggle) |\./run_all\.sh|tests/proofs/\S+\.sh)[^`\n]*)`")


def page_commands(page: Path) -> list[str]:
    """Lines of the code blocks of a page, but for comments and blocks of text, then the commands in its sentences."""
    text = page.read_text()
    lines = [line for kind, block in FENCE.findall(text) if kind != "text" for line in block.splitlines()]
    commands = [re.split(r"\s+#", line)[0].strip() for line in lines if line.strip()]
    return commands + [found for found in INLINE.findall(FENCE.sub("", text)) if found not in commands]


def all_commands() -> list[tuple[str, str]]:
    """Page and command, in the pages' order; a command that an earlier page has is not repeated."""
    found: list[tuple[str, str]] = []
    for page in PAGES:
        earlier = {command for _, command in found}
        found += [(page.name, command) for command in page_commands(page) if command not in earlier]
    return found


def differences() -> list[str]:
    """What is wrong between pages and tables, one sentence each."""
    there, known = {command for _, command in all_commands()}, COMMANDS.keys() | NOT_RUN.keys()
    lines = [f"not in the tables of tests/proofs/docs.py: {command}" for command in sorted(there - known)]
    lines += [f"in the tables, but on no page: {command}" for command in sorted(known - there)]
    return lines + [f"in both tables: {command}" for command in sorted(COMMANDS.keys() & NOT_RUN.keys())]


def as_run(command: str) -> str:
    """What is run for a command, with the substitutes."""
    words = (COMMANDS[command][0] or command).replace("SMALL", SMALL)
    return re.sub(r"(?<!\S)(DIR|FILE\.csv|TWENTY)(?!\S)", lambda word: SUBSTITUTES[word[0]], words)


@contextlib.contextmanager
def lab_of(project: Path, log: Path, environment: dict[str, str]) -> Iterator[str]:
    """JupyterLab of a project, on a free port and without a browser; gives the address of its start page."""
    with log.open("w") as file:
        options = {"stdout": file, "stderr": subprocess.STDOUT, "env": environment, "start_new_session": True}
        lab = subprocess.Popen(["./run_all.sh", "lab", "--no-browser", "--port", "0"], cwd=project, **options)
    try:
        for _ in range(240):
            if address := re.search(r"http://(?:localhost|127\.0\.0\.1):\d+/lab\S*token=\w+", log.read_text()):
                break
            time.sleep(0.5)
        else:
            raise RuntimeError(f"JupyterLab did not start; its log is {log}")
        yield address[0]
    finally:
        os.killpg(lab.pid, signal.SIGTERM)
        lab.wait()


def put_setting(project: Path) -> None:
    """Add the line of the README to the cell of 03 that holds the training's settings."""
    file = project / "notebooks/03_train_yolo.ipynb"
    notebook = json.loads(file.read_text())
    (cell,) = (cell for cell in notebook["cells"] if any("check_settings(" in line for line in cell["source"])
               and "settings = {\n" in cell["source"])  # fmt: skip
    place = cell["source"].index("check_settings(settings)\n")
    cell["source"].insert(place, f"{SETTING}\n")
    file.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")


def execute(project: Path, command: str, log: Path) -> tuple[int, int]:
    """Run what stands for a command in the project; its exit status (1 where expected words lack) and seconds."""
    began, (_, expected) = time.time(), COMMANDS[command]
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    if command == SETTING:
        put_setting(project)
        log.write_text("written into 03_train_yolo")
        status = 0
    elif command == "./run_all.sh lab":
        with lab_of(project, log, environment) as address, urllib.request.urlopen(address) as answer:
            status = int(answer.status != 200)
        with log.open("a") as file:
            file.write("answers")
    else:
        with log.open("w") as file:
            options = {"stdout": file, "stderr": subprocess.STDOUT, "stdin": subprocess.DEVNULL, "env": environment}
            status = subprocess.run(["bash", "-c", as_run(command)], cwd=project, **options).returncode
    if not status and not re.search(expected, log.read_text()):
        status = 1
    return status, round(time.time() - began)


def set_up(folder: Path) -> Path:
    """A clone of HEAD with a link to this environment, and beside it the folders of studies; the clone."""
    project = folder / "a clean clone"
    if project.is_dir():  # what `results` and `sample` wrote there is not kept
        subprocess.run(["git", "checkout", "--quiet", "--", "README.md", "docs", "outputs"], cwd=project, check=True)
        subprocess.run(["git", "pull", "--quiet", "--ff-only"], cwd=project, check=True)
        return project
    (folder / "logs").mkdir(parents=True)
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(project)], check=True)
    (project / ".venv").symlink_to(sys.prefix)  # set-up of an environment is not repeated
    for name, studies in (("some studies", 3), ("twenty studies", 20)):
        phantom.write_phantom(folder / name, studies, 0, 4000 + studies, workers=2)
    return project


def run_all(folder: Path) -> pd.DataFrame:
    """Run all commands in a folder, but those that were run there before without a failure; their list."""
    project, table = set_up(folder), folder / "commands.csv"
    done = pd.read_csv(table, keep_default_na=False).to_dict("records") if table.is_file() else []
    done, lines = [line for line in done if str(line["status"]) == "0"], []
    head = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], cwd=project, capture_output=True, text=True)
    for number, (page, command) in enumerate(all_commands()):
        line = {"page": page, "command": command, "run": "", "status": "", "seconds": "", "commit": head.stdout.strip()}
        if command in NOT_RUN:
            line["status"] = f"not run: {NOT_RUN[command]}"
        else:
            line["run"] = as_run(command)
            earlier = [old for old in done if all(old[key] == line[key] for key in ("page", "command", "run"))]
            if earlier:
                line = earlier[0]
                done.remove(line)
            else:
                line["status"], line["seconds"] = execute(project, command, folder / f"logs/{number:02d}.txt")
        lines.append(line)
        print(*line.values(), sep=" | ", flush=True)
        pd.DataFrame([*lines, *done]).to_csv(table, index=False)
    return pd.DataFrame(lines)


def main() -> int:
    """Run all commands, print and write their list; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, help="where clone, studies and logs are kept, to resume there")
    folder = parser.parse_args().folder
    if wrong := differences():
        print(*wrong, sep="\n")
        return 1
    for word, stand_in in {**SUBSTITUTES, "SMALL": SMALL}.items():
        print(f"{word}: {stand_in}")
    with contextlib.ExitStack() as stack:
        table = run_all((folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))).resolve())
    table.to_csv(ROOT / "docs/commands.csv", index=False)
    ran = table[table["run"] != ""]
    failed = ran[ran["status"].astype(str) != "0"]
    print(f"{len(ran)} commands ran, {len(table) - len(ran)} did not")
    print(*(f"FAILED: {command}" for command in failed["command"]), sep="\n")
    return int(len(failed) > 0)


if __name__ == "__main__":
    sys.exit(main())
