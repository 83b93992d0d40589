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
    : "${NFT_CONTAINER_RUNTIME:=pyxis}" "${NFT_CONTAINER_MOUNTS:=}" "${NFT_PLAN:=1}"
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
    for name in NFT_HET NFT_REQUEUE NFT_PLAN; do
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

# srun for one step on all trainer nodes; nft_dry_run prints the same array.
nft_train_command() { # $1 node list, $2 log file
    train_step=(srun ${trainer_group[@]+"${trainer_group[@]}"} --nodes="$NFT_TRAINER_NODES"
        --ntasks="$NFT_TRAINER_NODES" --ntasks-per-node=1 --nodelist="$1" --overlap --kill-on-bad-exit=1 --mpi=none
        --job-name=train --output="$2" --open-mode=append ${container[@]+"${container[@]}"}
        ${prefix[@]+"${prefix[@]}"} bash "$launch_dir/node.sh" "${settings[@]}"
        ${engine_settings[@]+"${engine_settings[@]}"})
}

nft_engine_command() { # $1 node list, $2 log file, $3 registry
    engine_step=(srun ${engine_group[@]+"${engine_group[@]}"} --nodes="$NFT_ENGINE_NODES"
        --ntasks="$NFT_ENGINE_NODES" --ntasks-per-node=1 --nodelist="$1" --overlap --mpi=none --job-name=engines
        --output="$2" --open-mode=append ${container[@]+"${container[@]}"} ${prefix[@]+"${prefix[@]}"}
        bash "$launch_dir/step.sh" -m megatron_nft.engines.serve --registry "$3" "${settings[@]}" \
        rollout.server.memory_saver=false)
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
