#!/bin/bash
# llama3_70b_ppo: written by nemo-rlhf slurm. Nodes and tasks are trainer.num_nodes and trainer.devices of the command
# at the end: write the script again to change them.
#SBATCH --job-name=llama3_70b_ppo
#SBATCH --account=my_account
#SBATCH --partition=batch
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --mem=0
#SBATCH --exclusive
#SBATCH --time=08:00:00
#SBATCH --signal=USR1@900
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=./%x-%j.log

export NCCL_DEBUG=WARN
export NCCL_IB_TIMEOUT=22
export SLURM_EXPORT_ENV=ALL # the ranks get what is set here, whatever sbatch was told to export

# Of each rank: an equal share of the smallest node, such as 96 of SLURM_JOB_CPUS_PER_NODE=128(x7),96. SLURM would bind it
# to a single one.
cores=$(($(tr , '\n' <<<"$SLURM_JOB_CPUS_PER_NODE" | sed 's/(.*//' | sort -n | head -n 1) / 8))
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$cores}"

set -uo pipefail
trap : TERM USR1 # this shell has to outlive the ranks, to read their exit codes
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
attempt=${SLURM_RESTART_COUNT:-0}
MASTER_ADDR=${nodes[0]}
# Below the range of outgoing connections; no two jobs of a cluster, and no two attempts, are likely to share it.
MASTER_PORT=$((10000 + (SLURM_JOB_ID * 31 + attempt) % 20000))
export MASTER_ADDR MASTER_PORT

run_dir=/shared/runs/llama3_70b_ppo
log_dir=$(realpath -m -- .)
job_logs=$log_dir/llama3_70b_ppo-$SLURM_JOB_ID
logs=$job_logs/attempt_$attempt
mkdir -p -- "$logs/preflight" "$run_dir" || exit 1
mounts=(/shared:/shared "$PWD:$PWD")
[[ $log_dir/ == "$PWD"/* ]] || mounts+=("$log_dir:$log_dir") # ranks write into it
container=(
    --container-image=/shared/images/nemo_rlhf.sqsh
    --container-mounts="$(IFS=, && printf %s "${mounts[*]}")"
    --container-workdir="$PWD"
    "--container-env=OMP_NUM_THREADS,NCCL_DEBUG,NCCL_IB_TIMEOUT" # also where the image has its own
)
inside=()

say() { echo "nemo-rlhf slurm: $*"; }

# Attempts in a row, however they came about, that began where the one before did.
newest_checkpoint() { find "$run_dir/checkpoints" -maxdepth 1 -name 'step_*[0-9]' 2>/dev/null | sort -V | tail -n 1; }
begun_at=$(newest_checkpoint)
in_vain=0 before=""
if [[ -f $job_logs/progress ]]; then
    { read -r in_vain; read -r before; } <"$job_logs/progress"
    [[ $begun_at == "$before" ]] && in_vain=$((in_vain + 1)) || in_vain=0
fi
printf '%s\n%s\n' "$in_vain" "$begun_at" >"$job_logs/progress"
if ((in_vain > 3)); then
    say "3 times back in the queue without a new checkpoint: no further attempt."
    exit 1
fi

# Gives SLURM a command until it succeeds: its controller may be away for a few minutes.
insist() {
    local try
    for try in {1..10}; do
        "$@" && return
        say "$1 failed, try $try of 10." >&2
        ((try == 10)) || sleep 30
    done
    return 1
}

# Ends with exit code $1, after going back into the queue where another attempt may get further.
finish() {
    local code=$1 newest state
    newest=$(newest_checkpoint)
    if ((code != 0 && code != 2)); then
        state=$(insist squeue -h -j "$SLURM_JOB_ID" -o %T)
        if [[ -z $state ]]; then
            say "SLURM does not say whether the job was cancelled: no further attempt."
        elif [[ $state == RUNNING ]]; then # not cancelled
            if [[ $newest != "$begun_at" ]] || ((in_vain < 3)); then
                say "exit code $code after ${newest:-no checkpoint}; back into the queue."
                insist scontrol requeue "$SLURM_JOB_ID" && exit "$code" # this ends the script, sooner or later
                say "SLURM does not take it back."
            else
                say "3 times back in the queue without a new checkpoint: this was the last attempt."
            fi
        fi
    fi
    say "ended with exit code $code after ${newest:-no checkpoint}."
    exit "$code"
}

# One process of a step. Its exit code goes to a file, as srun tells only the highest of all.
# shellcheck disable=SC2317,SC2329
rank() {
    local me=$1/rank_$SLURM_PROCID code keeper
    shift
    # With proctrack/cgroup SLURM signals this shell only: it passes signals on. The exit code it leaves to another, as
    # bash may lose that of a child that ends while a signal is handled.
    (
        trap : TERM USR1
        (echo "$BASHPID" >"$me.pid" && exec "$@")
        code=$?
        rm -f "$me.pid"
        echo "$(date +%s.%N) $code $SLURM_PROCID ${SLURMD_NODENAME:-$HOSTNAME}" >"$me.code"
        exit "$code"
    ) &
    keeper=$!
    pass() {
        while [[ ! -s $me.pid ]] && kill -0 "$keeper" 2>/dev/null; do sleep 0.1; done
        kill -s "$1" "$(<"$me.pid")"
    }
    trap 'pass TERM 2>/dev/null' TERM
    trap 'pass USR1 2>/dev/null' USR1
    while wait "$keeper"; code=$?; kill -0 "$keeper" 2>/dev/null; do :; done # a signal ends wait
    [[ -s $me.code ]] && read -r _ code _ <"$me.code"
    case $code in
    0 | 69 | 75) exit 0 ;; # the other ranks are about to end in the same way
    esac
    sleep 5 # the others say what they know of it before srun kills them
    exit "$code"
}
task="$(declare -f rank); rank \"\$@\""
ends_of() { cat "$1"/rank_*.code 2>/dev/null | sort -n; } # the first first

say "attempt $attempt on ${nodes[*]}; logs of ranks are in $logs"
timeout 600 srun --kill-on-bad-exit=1 --nodes=8 \
    --ntasks=64 --ntasks-per-node=8 \
    ${container[@]+"${container[@]}"} \
    bash -c "$task" rank "$logs/preflight" ${inside[@]+"${inside[@]}"} nemo-rlhf preflight \
    --reads=/shared/models/llama3-70b-sft --writes="$run_dir" --gpus=8 --min-free-gib=50.0 \
    --timeout-s=300 --nodes "${nodes[@]}"
code=$?
if ((code != 0)); then
    ends=$(ends_of "$logs/preflight")
    read -r _ first _ <<<"$ends"
    # A signal to the job ends all. Where one fails, or cannot start, srun sends TERM to the others; timeout sends it, too.
    if ((first == 138 || first == 143)) && ((code != 124)) &&
        (($(wc -l <<<"$ends") == 64)); then
        say "a signal ended the pre-flight step; nothing was started."
        finish 75
    fi
    say "the pre-flight step ended with exit code $code; nothing was started."
    # At first it is the set-up that is wrong; later, a node may have broken.
    ((attempt > 0)) && finish 1
    exit 1
fi

srun --kill-on-bad-exit=1 --nodes=8 --ntasks=64 --ntasks-per-node=8 \
    --cpus-per-task="$cores" \
    --output="$logs/rank_%t.log" ${container[@]+"${container[@]}"} \
    bash -c "$task" rank "$logs" ${inside[@]+"${inside[@]}"} \
    nemo-rlhf ppo \
    --config=examples/llama3_70b_ppo \
    exp_manager.explicit_log_dir=/shared/runs/llama3_70b_ppo \
    model.restore_from=/shared/models/llama3-70b-sft \
    data.prompts=/shared/data/prompts.jsonl \
    data.validation_prompts=/shared/data/validation_prompts.jsonl \
    reward.function=my_package.rewards:score
code=$?

# The rank that failed first decided the end; without one, 69 or 75 say that everything was saved.
ends=$(ends_of "$logs")
first=$(awk '$2 != 0 && $2 != 69 && $2 != 75 {print; exit}' <<<"$ends")
if [[ -n $first ]]; then
    read -r _ code culprit node <<<"$first"
    log=$logs/rank_$culprit.log
    if ((code == 2)); then # all ranks find the same mistake, and one says so
        log=$(grep -l '^nemo-rlhf: error' "$logs"/rank_*.log | sort -V | head -n 1)
        log=${log:-$logs/rank_$culprit.log}
    fi
    say "rank $culprit on $node ended first, with exit code $code; the end of $log:"
    tail -n 30 "$log"
elif ((code != 0)); then
    say "srun ended with exit code $code before any rank told its own; the ends of all logs:"
    tail -n 5 "$logs"/rank_*.log
elif grep -q ' 69 ' <<<"$ends"; then
    code=69
elif grep -q ' 75 ' <<<"$ends"; then
    code=75
fi
finish "$code"
