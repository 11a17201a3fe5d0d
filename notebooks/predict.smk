# Grading a folder with a finished run: 05 alone, one job per shard of studies. ./run_all.sh predict starts it with the
# folder of results as working directory; lsdc_utils/pipeline/predict.py lists the studies and joins the shards' answers.
# A shard is graded again if its files, the weights, blend.json, a parameter or the code of 05 changed.
import os
import sys
from pathlib import Path

from lsdc_utils.files import sha256
from lsdc_utils.pipeline import graph
from lsdc_utils.grading.run_tables import tables_of, weight_files

PYTHON = sys.executable
STEP = "05_ensemble_inference_{shard}"
RUN = Path(config["run_dir"])
MEMBERS = [member["name"] for member in config["vit_members"]]
WEIGHTS = weight_files(config["folds"], config["published_method"], config["conditions"], MEMBERS)
MODELS = [RUN / name for name in ("blend.json", *WEIGHTS)]
TABLES = [*tables_of(MEMBERS), "points", "sources", "slices", "findings"]

for times in Path("logs").glob("*.tsv"):
    os.utime(times, (1, 1))  # so that contents are compared, see Snakefile


rule all:
    input:
        [f"notebooks/{step.name}.ipynb" for step in graph.all_steps(config)],


rule grade:
    input:
        "tables/{shard}.parquet",
    output:
        expand("shards/{{shard}}/predictions/{table}_test.parquet", table=TABLES),
        "shards/{shard}/submission.csv",
        "shards/{shard}/scores.json",
        notebook="notebooks/05_ensemble_inference_{shard}.ipynb",
    params:
        step=STEP,
        parameters=lambda wildcards: graph.tracked_parameters(graph.select_steps(graph.all_steps(config), STEP.format(**wildcards))[0], config),
        source=graph.source_hash("05_ensemble_inference"),
        models=[*map(sha256, MODELS)],  # not inputs, whose names may not hold a brace
    log:
        "logs/05_ensemble_inference_{shard}.log",
    benchmark:
        "logs/05_ensemble_inference_{shard}.tsv"
    threads: config["threads"]
    resources:
        mem_mb=1500 + 5 * sum(file.stat().st_size for file in MODELS) // 4 // 2**20,  # 1,300 with the demo's two folds
        gpu=1,  # none if --resources has none
    shell:
        "{PYTHON:q} -m lsdc_utils.pipeline.graph . {params.step:q}"
