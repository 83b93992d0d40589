# shellcheck shell=bash
# Part of launcher.sh: inside a job. Runs the trainer and its engines, and decides how the job ends.

nft_nodes() { # trainer_nodes, engine_nodes, het options; refuses another count than asked for
    local all=()
    if [ "${SLURM_HET_SIZE:-1}" = 2 ]; then
        mapfile -t trainer_nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST_HET_GROUP_0")
        mapfile -t engine_nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST_HET_GROUP_1")
        trainer_group=(--het-group=0) engine_group=(--het-group=1)
    else
        mapfile -t all < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
        trainer_nodes=("${all[@]:0:NFT_TRAINER_NODES}") engine_nodes=("${all[@]:NFT_TRAINER_NODES}")
        trainer_group=() engine_group=()
    fi
    local have=$((${#trainer_nodes[@]} + ${#engine_nodes[@]}))
    ((have == NFT_NODES)) ||
        refuse "the job has $have nodes, $NFT_NODES are asked for: submit with NFT_NODES=$have if that is meant"
    local gpus=${SLURM_GPUS_ON_NODE:-0}
    [[ $gpus =~ ^[0-9]+$ ]] || gpus=0
    ((NFT_GPUS_PER_NODE == 0 || gpus == NFT_GPUS_PER_NODE)) ||
        refuse "a node of the job has $gpus GPUs, $NFT_GPUS_PER_NODE are asked for: set NFT_GPUS_PER_NODE=$gpus if meant"
}

nft_newest_checkpoint() { # name of the newest complete checkpoint, or nothing
    find "$run_dir/checkpoints" -maxdepth 1 -type d -name 'step_*' ! -name '*.partial' -printf '%f\n' 2>/dev/null |
        sort | tail -n 1
}

# Which rank failed first, on which node, in which phase: one line.
nft_explain() { # $1 status of srun
    local first rank status node line phase
    first=$(for file in "$NFT_STATUS_DIR"/rank-*; do
        [ -f "$file" ] && echo "$(cat "$file") ${file##*rank-}"
    done | awk '$2 != 0 && $2 != 75' | sort -n | head -n 1)
    phase=$(grep -aoE 'step [0-9]+, phase [a-z -]+' "$log" | tail -n 1)
    if [ -z "$first" ]; then
        line=$(grep -aE '^(srun: error|slurmstepd: error)' "$log" "$log.srun" 2>/dev/null | tail -n 1)
        echo "no rank said why (srun ended with $1${line:+: ${line##*error: }}); ${phase:-before the first phase}"
        return
    fi
    read -r _ status node rank <<<"$first"
    line=$(grep -aE "megatron-nft: rank $rank on " "$log" | tail -n 1)
    ((status != 2)) || line=$(grep -a '^megatron-nft train: ' "$log" | tail -n 1) # rank 0 says it for all
    if [ -n "$line" ] && ((status == 2)); then
        echo "refused: ${line#megatron-nft train: }"
    elif [ -n "$line" ]; then
        echo "node $node: ${line#megatron-nft: }"
    elif ((status > 128)); then
        echo "rank $rank on node $node, ${phase:-before the first phase}: ended by signal $((status - 128))" \
            "($(kill -l $((status - 128))))"
    else
        echo "rank $rank on node $node, ${phase:-before the first phase}: ended with status $status"
    fi
}

# Checks settings and files on the first node; sets facts: run folder, the node's address. Ends the job if it cannot.
nft_check() {
    local try answer status
    for try in 1 2 3; do
        answer=$(srun ${trainer_group[@]+"${trainer_group[@]}"} --nodes=1 --ntasks=1 --nodelist="${trainer_nodes[0]}" \
            --overlap --mpi=none ${container[@]+"${container[@]}"} ${prefix[@]+"${prefix[@]}"} \
            bash "$launch_dir/step.sh" "$launch_dir/check.py" --ranks=$((NFT_TRAINER_NODES * NFT_PROCS_PER_NODE)) \
            --engine-nodes="$NFT_ENGINE_NODES" "${settings[@]}")
        status=$?
        mapfile -t facts < <(tail -n 2 <<<"$answer") # NFT_SETUP may have printed before
        ((status != 0 || ${#facts[@]} != 2)) || return 0
        ((status != 2)) || exit 2 # the check has said why
        sleep $((try * 5)) # a step that did not start: busy nodes or controller
    done
    say "failed: the check of the settings did not run on node ${trainer_nodes[0]} (srun ended with $status)"
    exit 1
}

# Would the run start on these nodes? The job ends if it would not.
nft_doctor() { # $1 trainer or engines, $2 node list
    [ "$NFT_DOCTOR" = 1 ] || return 0
    nft_doctor_command "$1" "$2"
    "${doctor_step[@]}" && return
    say "failed: the doctor found what would stop the run on the nodes of ${1/%trainer/the trainer}: see above" \
        "(NFT_DOCTOR=0 starts it all the same)"
    exit 1
}

nft_train() {
    nft_settings "$@"
    nft_nodes
    nft_container
    local control restart=${SLURM_RESTART_COUNT:-0} facts
    nft_check
    run_dir=${facts[0]}
    export NFT_MASTER_ADDR=${facts[1]}
    # Jobs on one node, or starts of one job, use different ports. Those from 32768 on are the kernel's to give away.
    export NFT_MASTER_PORT=$((20000 + (SLURM_JOB_ID * 17 + restart) % 12000))
    control=$run_dir/slurm
    export NFT_STATUS_DIR=$control/${SLURM_JOB_ID}_$restart
    log=${NFT_LOG_DIR:-$run_dir/logs}/$SLURM_JOB_NAME-${SLURM_JOB_ID}_$restart.log
    mkdir -p "$NFT_STATUS_DIR" "$(dirname "$log")" || refuse "run_dir $run_dir cannot be written"
    if [ -n "${NFT_CHAIN:-}" ] && [ "$(cat "$control/finished" 2>/dev/null)" = "$NFT_CHAIN" ]; then
        say "an earlier job of this chain has finished the run"
        exit 0
    fi
    say "job $SLURM_JOB_ID, start $restart: trainer on $(nft_join "${trainer_nodes[@]}")," \
        "rendezvous $NFT_MASTER_ADDR:$NFT_MASTER_PORT, log $log"

    engines_pid=""
    nft_engine_settings "$NFT_STATUS_DIR/engines"
    nft_doctor trainer "$(nft_join "${trainer_nodes[@]}")"
    ((NFT_ENGINE_NODES == 0)) || nft_doctor engines "$(nft_join "${engine_nodes[@]}")"
    if ((NFT_ENGINE_NODES)); then
        nft_engine_command "$(nft_join "${engine_nodes[@]}")" "${log%.log}.engines.log" "$NFT_STATUS_DIR/engines"
        mkdir -p "$NFT_STATUS_DIR/engines"
        "${engine_step[@]}" &
        engines_pid=$!
    fi
    nft_train_command "$(nft_join "${trainer_nodes[@]}")" "$log"
    trap 'say "warning signal: the ranks are asked to save"; touch "$NFT_STATUS_DIR/stop"' USR1
    "${train_step[@]}" 2> >(tee -a "$log.srun" >&2) &
    nft_wait $!
    nft_stop_engines
    nft_finish "$status"
}

nft_wait() { # waits for a child through trapped signals; sets `status`
    while :; do
        wait "$1"
        status=$?
        kill -0 "$1" 2>/dev/null || break
    done
}

nft_stop_engines() {
    [ -n "$engines_pid" ] || return 0
    touch "$NFT_STATUS_DIR/engines/stop"
    local patience=60
    while kill -0 "$engines_pid" 2>/dev/null && ((patience-- > 0)); do sleep 1; done
    kill -TERM "$engines_pid" 2>/dev/null && wait "$engines_pid"
}

# Ends the job: finished, saved and to be run again, or failed.
nft_finish() { # $1 status of the train step
    local saved before failures=0 newest failure
    saved=$(cat "$NFT_STATUS_DIR"/rank-* 2>/dev/null | awk '$2 == 75' | wc -l)
    newest=$(nft_newest_checkpoint)
    if (($1 == 0 && saved == 0)); then
        [ -z "${NFT_CHAIN:-}" ] || echo "$NFT_CHAIN" >"$run_dir/slurm/finished"
        rm -f "$run_dir/slurm/failures"
        say "finished (${newest:-no checkpoint})"
        exit 0
    fi
    if (($1 == 0)); then
        nft_again "saved ${newest:-nothing yet, the first step was under way}"
        exit 75
    fi
    failure=$(nft_explain "$1")
    read -r before failures 2>/dev/null <"$run_dir/slurm/failures" || before=none failures=0
    [ "$before" = "${newest:-none}" ] || failures=0
    failures=$((failures + 1))
    echo "${newest:-none} $failures" >"$run_dir/slurm/failures"
    if awk '$2 == 2 { bad = 1 } END { exit !bad }' "$NFT_STATUS_DIR"/rank-*; then
        say "$failure" # settings or inputs that cannot be used: a second try would end the same way
        exit 2
    fi
    if ((failures < NFT_MAX_FAILURES)); then
        [ "$NFT_REQUEUE" = 0 ] || say "failed: $failure"
        nft_again "failure $failures of at most $NFT_MAX_FAILURES in a row without a new checkpoint"
    fi
    say "failed: $failure" # the last line of a job that is not tried again
    exit 1
}

# Puts the job back into the queue where that is wanted and allowed. $1 says why; the line stands before Slurm's own.
nft_again() {
    if [ "$NFT_REQUEUE" = 1 ]; then
        say "$1; the job goes back into the queue"
        local try now
        for try in 1 2 3 4 5; do # a busy controller refuses at times
            now=$(scontrol show job "$SLURM_JOB_ID" 2>/dev/null | grep -om1 'Restarts=[0-9]*')
            if [ -n "$now" ] && [ "$now" != "Restarts=$restart" ]; then # for a lost node; ours would end the new start
                say "Slurm has put it there already"
                exit 0
            fi
            scontrol requeue "$SLURM_JOB_ID" && exit 0
            sleep $((try * 2))
        done
        say "Slurm refused to requeue; submit again to go on"
    elif [ -n "${NFT_CHAIN:-}" ]; then
        say "$1; the next job of the chain goes on"
    else
        say "$1; submit again to go on"
    fi
}

nft_command() {
    nft_container
    say "job $SLURM_JOB_ID: ${command_name[*]} $*"
    srun --nodes=1 --ntasks=1 --mpi=none ${container[@]+"${container[@]}"} ${prefix[@]+"${prefix[@]}"} \
        bash "$launch_dir/step.sh" "${command_name[@]}" "$@" &
    nft_wait $!
    ((status == 0)) || say "failed: '${command_name[*]}' ended with status $status on node ${SLURMD_NODENAME:-?}"
    exit "$status"
}
