# shellcheck shell=bash
# Part of launcher.sh: outside a job. Sorts the arguments, checks the settings, submits or shows what would be.

# Sorts the arguments: options of ours, options of sbatch (up to `--`), and the command's own.
nft_sort_arguments() {
    dry_run=0 chain=1 sbatch_options=() arguments=()
    while (($#)); do
        case $1 in
            --dry-run) dry_run=1 ;;
            --chain=*) chain=${1#--chain=} ;;
            --) shift; arguments+=("$@"); break ;;
            --*) sbatch_options+=("$1") ;;
            -*) refuse "$1: write options of sbatch as --name=value, and the command's own after --" ;;
            *) arguments+=("$1") ;;
        esac
        shift
    done
    [[ $chain =~ ^[1-9][0-9]*$ ]] || refuse "--chain=$chain: must be at least 1"
}

nft_check_train() { # ends with status 2 and one line if the run cannot work
    if ! "$NFT_PYTHON" -c 'import numpy, pydantic, yaml' 2>/dev/null; then
        say "$NFT_PYTHON cannot read the settings here; they are checked when the job starts"
        return
    fi
    "$NFT_PYTHON" "$launch_dir/check.py" --ranks=$((NFT_TRAINER_NODES * NFT_PROCS_PER_NODE)) \
        --engine-nodes="$NFT_ENGINE_NODES" "${settings[@]}" >/dev/null || exit 2
    if [ "$NFT_PLAN" = 1 ] && [ -n "${NFT_GPU:-}" ]; then
        local report status
        report=$("$NFT_PYTHON" -m megatron_nft plan --nodes "$NFT_NODES" --gpus-per-node "$NFT_PROCS_PER_NODE" \
            --gpu "$NFT_GPU" --engine-nodes "$NFT_ENGINE_NODES" "${settings[@]}" 2>&1)
        status=$?
        ((status < 2)) || refuse "${report#megatron-nft plan: }"
        if ((status == 1)); then
            sed -n '/^DOES NOT FIT/,$p' <<<"$report" >&2
            refuse "the run does not fit $NFT_NODES nodes x $NFT_PROCS_PER_NODE $NFT_GPU (NFT_PLAN=0 submits all the same)"
        fi
    fi
}

nft_submit() { # $1: train or command; the script is $0
    local script nodes options problem
    script=$(cd "$(dirname "$0")" && pwd)/$(basename "$0")
    if [ "$1" = train ]; then
        nft_settings ${arguments[@]+"${arguments[@]}"}
        problem=0
        (nft_check_train) || problem=$?
        ((problem == 0 || dry_run == 1)) || exit $problem
    fi
    if [ "$chain" -gt 1 ]; then
        NFT_CHAIN=$$-$(date +%s) # tells the jobs of this chain from those of another
        NFT_REQUEUE=0
        export NFT_CHAIN NFT_REQUEUE
    fi
    nodes=$NFT_NODES
    options=(--parsable --gpus-per-node="$NFT_GPUS_PER_NODE")
    [ "$NFT_REQUEUE" = 1 ] || options+=(--no-requeue)
    options+=(${sbatch_options[@]+"${sbatch_options[@]}"})
    if [ "$NFT_HET" = 1 ]; then
        nodes=$NFT_TRAINER_NODES
        options+=(--nodes="$nodes" : --nodes="$NFT_ENGINE_NODES" --ntasks-per-node=1 --exclusive --mem=0
            "${options[@]:1}")
    else
        options+=(--nodes="$nodes")
    fi
    export NFT_NODES
    local command=(sbatch "${options[@]}" "$script" ${arguments[@]+"${arguments[@]}"})
    if [ $dry_run = 1 ]; then
        echo "# submit ($chain job$([ "$chain" = 1 ] || echo "s, each after the one before has ended"))"
        printf '%q ' "${command[@]}"
        echo
        nft_dry_run "$1"
        return ${problem:-0}
    fi
    local i job previous="" answer
    # A partition that is too small would let the job wait for ever; the planner of Slurm says so now.
    [ "$NFT_HET" = 1 ] || answer=$(sbatch --test-only "${command[@]:1}" 2>&1) ||
        refuse "Slurm refuses the job: $(grep -m 1 -E 'error|failure' <<<"$answer" | sed 's/^[a-z]*: error: //')"
    for ((i = 0; i < chain; i++)); do
        job=$(sbatch ${previous:+--dependency=afterany:$previous} "${command[@]:1}") || exit 2
        previous=${job%%;*}
        say "submitted job $previous"
    done
}

nft_dry_run() {
    trainer_group=() engine_group=()
    nft_container
    if [ "$1" = command ]; then
        echo "# on the first node"
        printf '%q ' srun --nodes=1 --ntasks=1 ${container[@]+"${container[@]}"} ${prefix[@]+"${prefix[@]}"} \
            bash "$launch_dir/step.sh" "${command_name[@]}" ${arguments[@]+"${arguments[@]}"}
        echo
        return
    fi
    [ "$NFT_HET" = 0 ] || trainer_group=(--het-group=0) engine_group=(--het-group=1)
    nft_engine_settings RUN_DIR/slurm/JOB_RESTART/engines
    NFT_MASTER_ADDR=FIRST_NODE NFT_MASTER_PORT=PORT
    if [ "$NFT_DOCTOR" = 1 ]; then
        echo "# doctor"
        local kind shown
        for kind in trainer $( ((NFT_ENGINE_NODES == 0)) || echo engines); do
            shown=${kind%s}
            nft_doctor_command "$kind" "${shown^^}_NODES"
            printf '%q ' "${doctor_step[@]}"
            echo
        done
    fi
    nft_train_command TRAINER_NODES RUN_DIR/logs/NAME-JOB_RESTART.log
    echo "# trainer: $NFT_TRAINER_NODES nodes x $NFT_PROCS_PER_NODE ranks"
    printf '%q ' "${train_step[@]}"
    echo
    if ((NFT_ENGINE_NODES)); then
        nft_engine_command ENGINE_NODES RUN_DIR/logs/NAME-JOB_RESTART.engines.log RUN_DIR/slurm/JOB_RESTART/engines
        echo "# engines: $NFT_ENGINE_NODES nodes"
        printf '%q ' "${engine_step[@]}"
        echo
    fi
    echo "# environment"
    env | grep -E '^(NFT|NCCL|GLOO|UCX|CUDA|TORCH|OMP)_' | sort
}
