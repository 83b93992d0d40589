# shellcheck shell=bash
# What the job scripts of this folder share. A script sets its defaults and calls one of
#
#   nft_main train "$@"                the trainer, its engines, warning signal, requeue
#   nft_main command ARGS... -- "$@"   `python ARGS...` on the first node
#
# Outside a job this checks the settings and submits the script (submit.sh); inside a job it runs (job.sh). Every
# variable (NFT_…) that a user may set is described in docs/cluster.md.
set -uo pipefail
launch_dir=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
NFT_HOME=$(dirname "$launch_dir")
export NFT_HOME

say() { echo "nft: $*"; }
refuse() { # bad input: one line, status 2
    echo "nft: $*" >&2
    exit 2
}

nft_defaults() {
    if [ -z "${NFT_PYTHON:-}" ]; then
        NFT_PYTHON=$NFT_HOME/.venv/bin/python
        [ -n "${NFT_CONTAINER_IMAGE:-}" ] || [ ! -x "$NFT_PYTHON" ] && NFT_PYTHON=python3
    fi
    : "${NFT_ENGINE_NODES:=0}" "${NFT_HET:=0}" "${NFT_REQUEUE:=1}" "${NFT_MAX_FAILURES:=3}"
    : "${NFT_CONTAINER_RUNTIME:=pyxis}" "${NFT_CONTAINER_MOUNTS:=}" "${NFT_PLAN:=1}" "${NFT_DOCTOR:=1}"
    [[ $NFT_PYTHON != */* || $NFT_PYTHON == /* ]] || NFT_PYTHON=$PWD/$NFT_PYTHON
    export NFT_PYTHON
    export PYTHONPATH=$NFT_HOME${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
    if [ -n "${NFT_IFNAME:-}" ]; then
        export GLOO_SOCKET_IFNAME=$NFT_IFNAME NCCL_SOCKET_IFNAME=$NFT_IFNAME
    fi
    local name
    for name in NFT_NODES NFT_GPUS_PER_NODE NFT_ENGINE_NODES NFT_MAX_FAILURES; do
        [[ ${!name:-0} =~ ^[0-9]+$ ]] || refuse "$name=${!name}: must be a whole number"
    done
    for name in NFT_HET NFT_REQUEUE NFT_PLAN NFT_DOCTOR; do
        [[ ${!name} =~ ^[01]$ ]] || refuse "$name=${!name}: must be 0 or 1"
    done
    [[ $NFT_CONTAINER_RUNTIME =~ ^(pyxis|apptainer)$ ]] ||
        refuse "NFT_CONTAINER_RUNTIME=$NFT_CONTAINER_RUNTIME: must be pyxis or apptainer"
    NFT_PROCS_PER_NODE=${NFT_PROCS_PER_NODE:-$NFT_GPUS_PER_NODE}
    [[ $NFT_PROCS_PER_NODE =~ ^[1-9][0-9]*$ ]] || refuse "NFT_PROCS_PER_NODE=$NFT_PROCS_PER_NODE: must be at least 1"
    ((NFT_ENGINE_NODES < NFT_NODES)) ||
        refuse "NFT_ENGINE_NODES=$NFT_ENGINE_NODES: must be below NFT_NODES ($NFT_NODES), the trainer needs a node"
    ((NFT_ENGINE_NODES > 0)) || [ "$NFT_HET" = 0 ] || refuse "NFT_HET=1 needs NFT_ENGINE_NODES"
    NFT_TRAINER_NODES=$((NFT_NODES - NFT_ENGINE_NODES))
    export NFT_TRAINER_NODES NFT_PROCS_PER_NODE NFT_GPUS_PER_NODE NFT_ENGINE_NODES
}

# Options of srun that put a step into the container, and the command prefix for apptainer.
nft_container() {
    container=() prefix=()
    [ -n "${NFT_CONTAINER_IMAGE:-}" ] || return 0
    local mounts=$PWD:$PWD
    [ "$PWD" = "$NFT_HOME" ] || mounts+=,$NFT_HOME:$NFT_HOME
    [ -z "$NFT_CONTAINER_MOUNTS" ] || mounts+=,$NFT_CONTAINER_MOUNTS
    if [ "$NFT_CONTAINER_RUNTIME" = pyxis ]; then
        container=(--container-image="$NFT_CONTAINER_IMAGE" --container-workdir="$PWD"
            --container-mounts="$mounts")
    else
        prefix=(apptainer exec --nv --pwd "$PWD" --bind "$mounts" "$NFT_CONTAINER_IMAGE")
    fi
}

# The settings as options of `train` and `plan`: --config FILE key=value …
nft_settings() {
    [ -n "${NFT_CONFIG:-}" ] || refuse "NFT_CONFIG is not set: name the settings file"
    local file=$NFT_CONFIG
    [ -e "$file" ] || file=$NFT_HOME/$NFT_CONFIG
    [ -f "$file" ] || refuse "NFT_CONFIG=$NFT_CONFIG: no such file here or in $NFT_HOME"
    settings=(--config "$(cd "$(dirname "$file")" && pwd)/$(basename "$file")" "$@")
    local i
    for ((i = 2; i < ${#settings[@]}; i++)); do
        [[ ${settings[i]} == *=* ]] || refuse "'${settings[i]}': settings are written key=value, options of sbatch --name=value"
    done
}

# What the trainer is told of engines on nodes of their own. $1 the folder in which they announce themselves
nft_engine_settings() {
    engine_settings=()
    ((NFT_ENGINE_NODES == 0)) || engine_settings=(rollout.server.registry="$1"
        rollout.server.registry_nodes="$NFT_ENGINE_NODES" rollout.server.memory_saver=false)
}

nft_join() { local IFS=,; echo "$*"; }

# Cores for a step's one task on each node: all of the node's that has fewest. Without it, or bound by srun, the task and
# all of its ranks would share one core on many sites.
nft_cores() { # $1 SLURM_JOB_CPUS_PER_NODE, such as 96(x3),64
    tr , '\n' <<<"${1:-}" | sed 's/(.*//' | grep -E '^[1-9][0-9]*$' | sort -n | head -n 1
}

nft_binding() { # $1 the job's, or the component's, CPUs on each node
    local cores
    cores=$(nft_cores "$1")
    binding=(--cpu-bind=none ${cores:+--cpus-per-task="$cores"})
}

# srun for one step on all trainer nodes; nft_dry_run prints the same array.
nft_train_command() { # $1 node list, $2 log file
    nft_binding "${SLURM_JOB_CPUS_PER_NODE_HET_GROUP_0:-${SLURM_JOB_CPUS_PER_NODE:-}}"
    train_step=(srun ${trainer_group[@]+"${trainer_group[@]}"} --nodes="$NFT_TRAINER_NODES"
        --ntasks="$NFT_TRAINER_NODES" --ntasks-per-node=1 --nodelist="$1" --overlap --kill-on-bad-exit=1 --mpi=none
        "${binding[@]}"
        --job-name=train --output="$2" --open-mode=append ${container[@]+"${container[@]}"}
        ${prefix[@]+"${prefix[@]}"} bash "$launch_dir/node.sh" "${settings[@]}"
        ${engine_settings[@]+"${engine_settings[@]}"})
}

nft_engine_command() { # $1 node list, $2 log file, $3 registry
    nft_binding "${SLURM_JOB_CPUS_PER_NODE_HET_GROUP_1:-${SLURM_JOB_CPUS_PER_NODE:-}}"
    engine_step=(srun ${engine_group[@]+"${engine_group[@]}"} --nodes="$NFT_ENGINE_NODES"
        --ntasks="$NFT_ENGINE_NODES" --ntasks-per-node=1 --nodelist="$1" --overlap --mpi=none --job-name=engines
        "${binding[@]}"
        --output="$2" --open-mode=append ${container[@]+"${container[@]}"} ${prefix[@]+"${prefix[@]}"}
        bash "$launch_dir/step.sh" -m megatron_nft.engines.serve --registry "$3" "${settings[@]}" \
        rollout.server.memory_saver=false)
}

# The doctor on nodes of one kind, before anything starts on them.
nft_doctor_command() { # $1 trainer or engines, $2 node list
    local group=(${trainer_group[@]+"${trainer_group[@]}"}) nodes=$NFT_TRAINER_NODES ranks=$NFT_PROCS_PER_NODE
    local told=(${engine_settings[@]+"${engine_settings[@]}"})
    local cores=${SLURM_JOB_CPUS_PER_NODE_HET_GROUP_0:-${SLURM_JOB_CPUS_PER_NODE:-}}
    if [ "$1" = engines ]; then
        group=(${engine_group[@]+"${engine_group[@]}"}) nodes=$NFT_ENGINE_NODES ranks=0
        told=(rollout.server.memory_saver=false)
        cores=${SLURM_JOB_CPUS_PER_NODE_HET_GROUP_1:-${SLURM_JOB_CPUS_PER_NODE:-}}
    fi
    nft_binding "$cores"
    doctor_step=(srun ${group[@]+"${group[@]}"} --nodes="$nodes" --ntasks="$nodes" --ntasks-per-node=1
        --nodelist="$2" --overlap --mpi=none "${binding[@]}" --job-name=doctor ${container[@]+"${container[@]}"}
        ${prefix[@]+"${prefix[@]}"} bash "$launch_dir/step.sh" -m megatron_nft doctor --ranks-per-node="$ranks"
        "${settings[@]}" ${told[@]+"${told[@]}"})
}

. "$launch_dir/submit.sh"
. "$launch_dir/job.sh"

nft_main() {
    local kind=$1
    shift
    if [ "$kind" = command ]; then
        command_name=()
        while [ "$1" != -- ]; do command_name+=("$1"); shift; done
        shift
    fi
    nft_defaults
    # Only a batch script has a node's name and no step: in the shells of salloc and `srun --pty` we submit.
    if [ -n "${SLURM_JOB_ID:-}" ] && [ -n "${SLURMD_NODENAME:-}" ] && [ -z "${SLURM_STEP_ID:-}" ]; then
        [ "${1:-}" != -- ] || shift
        "nft_$kind" "$@"
    else
        nft_sort_arguments "$@"
        nft_submit "$kind"
    fi
}
