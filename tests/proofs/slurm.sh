#!/usr/bin/env bash
# A run on a SLURM cluster gives the same bytes as one without, each step is a job, and a stopped run leaves no job:
#   sudo tests/proofs/slurm.sh
# Needs root, the Python environment of the project as the active one (or .venv), and Debian's slurm-wlm and munge. The cluster
# is this machine, with two pretended GPUs. Its daemons live in namespaces of their own and end with this script.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
if [ "${1:-}" != alone ]; then
    exec unshare --mount --pid --fork --mount-proc --kill-child "${BASH_SOURCE[0]}" alone
fi
folder=$(mktemp -d)
echo "in $folder, which is kept if something fails"
[ -d "$root/.venv" ] && PATH="$root/.venv/bin:$PATH"

start_slurm() { # slurmctld, slurmd and munged of a cluster of this machine alone
    local host
    host=$(hostname -s)
    mkdir "$folder"/{etc,state,spool}
    dd if=/dev/urandom of="$folder/munge.key" bs=1024 count=1 status=none
    chmod 600 "$folder/munge.key"
    mknod "$folder/gpu0" c 1 3 # of /dev/null: SLURM asks for a device, nothing opens it
    mknod "$folder/gpu1" c 1 3
    echo "Name=gpu File=$folder/gpu[0-1]" >"$folder/etc/gres.conf"
    cat >"$folder/etc/slurm.conf" <<CONF
ClusterName=proof
SlurmctldHost=$host
SlurmUser=root
AuthInfo=socket=$folder/munge.socket
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.log
ProctrackType=proctrack/linuxproc
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
MinJobAge=7200
GresTypes=gpu
NodeName=$host CPUs=$(nproc) RealMemory=1000000 Gres=gpu:2
PartitionName=all Nodes=ALL Default=YES
CONF
    mount --bind "$folder/etc" /etc/slurm # seen by this script and what it starts
    chmod 755 "$folder"
    munged --force --key-file="$folder/munge.key" --socket="$folder/munge.socket" --pid-file="$folder/munged.pid" \
        --log-file="$folder/munged.log" --seed-file="$folder/munged.seed"
    slurmctld
    slurmd
    for _ in {1..30}; do
        [ "$(sinfo --noheader --format=%T)" = idle ] && return
        sleep 1
    done
    tail "$folder"/*.log
    return 1
}

login() { # run_all.sh on a machine that does not see the nodes' processes
    unshare --mount --pid --fork --mount-proc --kill-child ./run_all.sh --profile smoke --cores 2 "$@"
}

states() { # how many of a run's jobs are in a state
    squeue --noheader --states=all --format=%T --name \
        "$(sed -n 's/^SLURM run ID: //p' "outputs/$1/logs/snakemake.log")" | grep -cx "$2" || true
}

start_slurm
mkdir "$folder/project"
tar -C "$root" -c lsdc_utils notebooks run_all.sh requirements.txt | tar -C "$folder/project" -x
cd "$folder/project"

login --run stopped --slurm &
runner=$!
until squeue --noheader --states=running | grep -q . || ! kill -0 $runner; do sleep 1; done
pkill -TERM --full lsdc_utils.pipeline.commands # there is no other among this script's processes
wait $runner && exit 1
[ "$(states stopped CANCELLED)" = 1 ]
echo "stopped: its job was cancelled"

login --run local
login --run cluster --slurm
steps=$(ls outputs/cluster/notebooks | wc -l)
[ "$(states cluster COMPLETED)" = "$steps" ]
echo "$steps steps were $steps jobs"
for table in submission.csv predictions/ensemble_oof.parquet tables/labels.parquet; do
    cmp outputs/{local,cluster}/"$table"
    echo "$table: the same bytes"
done
cd /
rm -r "$folder"
