#!/usr/bin/env bash
# An OpenMPI job over the nodes of a hostfile, started from the repository's root:
#   launch/mpi.sh HOSTFILE launch/recipes/nuwa_870m.yaml --deepspeed_config ds_configs/zero1_bf16.json
# SCRIPT=launch/preflight.py launch/mpi.sh HOSTFILE RECIPE checks the nodes only.
# SCRIPT=launch/train_vqgan.py launch/mpi.sh HOSTFILE RECIPE trains the recipe's VQ-GAN.
# MPI_ARGS holds further options of mpirun, MASTER_PORT the port where the processes meet,
# RESTARTS (default 10) how often the run is started again after a fault.
set -euo pipefail

if (($# < 2)); then
    echo "error: a hostfile and a recipe are needed; example: launch/mpi.sh hostfile launch/recipes/demo.yaml" >&2
    exit 2
fi
hostfile=$1
shift
if [[ ! -r $hostfile ]]; then
    echo "error: hostfile $hostfile cannot be read; launch/hostfile.example is one" >&2
    exit 2
fi
python=${PYTHON:-.venv/bin/python}
script=${SCRIPT:-launch/pretrain.py}

# "node-01 slots=8": the name of the first node, and all slots together.
first=$(awk '!/^[[:space:]]*(#|$)/ { print $1; exit }' "$hostfile")
slots=$(awk -F 'slots=' '!/^[[:space:]]*(#|$)/ { total += ($2 ? $2 : 1) } END { print total + 0 }' "$hostfile")

# Only what -x names reaches other nodes; of two of one name mpirun takes the first.
exports=()
if [[ -f .deepspeed_env ]]; then
    while IFS= read -r line || [[ -n $line ]]; do
        [[ -z $line ]] || exports+=(-x "$line")
    done <.deepspeed_env
fi
exports+=(-x PATH -x MASTER_ADDR="${MASTER_ADDR:-$first}" -x MASTER_PORT="${MASTER_PORT:-29500}")
for name in LD_LIBRARY_PATH PYTHONPATH; do
    if [[ -n ${!name:-} ]]; then
        exports+=(-x "$name")
    fi
done

# One process a slot; binding a process to one core would starve its loader threads.
# shellcheck disable=SC2086
exec "$python" -u launch/supervise.py --restarts "${RESTARTS:-10}" \
    mpirun --hostfile "$hostfile" -n "$slots" --bind-to none ${MPI_ARGS:-} "${exports[@]}" \
    "$python" -u "$script" "$@"
