#!/usr/bin/env bash
# A Slurm job of 8 nodes × 8 GPUs, submitted from the repository's root:
#   sbatch launch/slurm.sh launch/recipes/nuwa_870m.yaml
# SCRIPT=launch/preflight.py sbatch launch/slurm.sh RECIPE checks the nodes only.
# SCRIPT=launch/train_vqgan.py sbatch launch/slurm.sh RECIPE trains the recipe's VQ-GAN.
# RESTARTS (default 10) says how often the run is started again inside the job after a fault.
#SBATCH --job-name=nuwa
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log
set -euo pipefail

if (($# == 0)); then
    echo "error: no recipe given; example: sbatch launch/slurm.sh launch/recipes/demo.yaml" >&2
    exit 2
fi
python=${PYTHON:-.venv/bin/python}
script=${SCRIPT:-launch/pretrain.py}

# srun hands this environment to all nodes. The file is no shell script: a value may hold spaces.
if [[ -f .deepspeed_env ]]; then
    while IFS= read -r line || [[ -n $line ]]; do
        # shellcheck disable=SC2163
        [[ -z $line ]] || export "$line"
    done <.deepspeed_env
fi

# Five minutes before the time limit, and when it is preempted, the run saves and ends; the job is
# queued again as long as the last step is not reached, and goes on from there then.
tasks=
stopping=
save_and_end() {
    stopping=yes
    echo "job $SLURM_JOB_ID was told to end (time limit or preemption): it saves and ends"
    # Of SIGTERM, srun would kill its tasks.
    [[ -z $tasks ]] || kill -USR1 "$tasks" 2>/dev/null || true
}
trap save_and_end USR1 TERM

# One task a GPU. The processes read rank, size and meeting point from Slurm's variables. Before
# 23.11 srun may not take --cpus-per-task over from the job.
unfinished=75
"$python" -u launch/supervise.py --restarts "${RESTARTS:-10}" --unfinished "$unfinished" \
    srun --kill-on-bad-exit=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" \
    "$python" -u "$script" "$@" &
tasks=$!
[[ -z $stopping ]] || kill -USR1 "$tasks"
# A signal ends a wait early; the tasks' own exit code is what counts.
code=0
while true; do
    wait "$tasks" && code=0 || code=$?
    kill -0 "$tasks" 2>/dev/null || break
done
if ((code != unfinished)); then
    exit "$code"
fi
# Slurm calls a job that it ends, or that was cancelled, COMPLETING as long as this script runs.
state=$(scontrol show job "$SLURM_JOB_ID")
if ! grep -qE 'JobState=RUNNING|Reason=TimeLimit|PreemptTime=[0-9]' <<<"$state"; then
    echo "job $SLURM_JOB_ID was cancelled before the last step, so it is not queued again"
    exit 0
fi
echo "the last step is not reached: job $SLURM_JOB_ID is queued again"
scontrol requeue "$SLURM_JOB_ID"
