#!/usr/bin/env bash
# Writes the job scripts of this directory again, for the cluster that a file describes:
#
#   scripts/slurm/render.sh [CLUSTER_FILE [OUT_DIR [key=value ...]]]     e.g. scripts/slurm/render.sh my_cluster.yaml jobs
#
# Models, data and run directories are below $SHARED, which every node sees. The scripts that are shipped were written
# by it as it stands; to train with other settings, copy one of its commands.
set -euo pipefail

cluster=${1:-cluster/pyxis}
out=${2:-$(dirname "${BASH_SOURCE[0]}")}
SHARED=${SHARED:-/shared}
more=("${@:3}")

job() { # NAME COMMAND CONFIG WORDS...
    local name=$1 command=$2 config=$3
    nemo-rlhf slurm "$command" --cluster "$cluster" --config "examples/$config" --out "$out/$name.sh" \
        "slurm.job_name=$name" "exp_manager.explicit_log_dir=$SHARED/runs/$name" "${@:4}" ${more[@]+"${more[@]}"}
}

job llama3_8b_sft sft llama3_8b_sft \
    "model.restore_from=$SHARED/models/llama3-8b" \
    "data.train=$SHARED/data/train.jsonl" "data.validation=$SHARED/data/validation.jsonl"

job llama3_8b_ppo ppo llama3_8b_ppo \
    "model.restore_from=$SHARED/runs/llama3_8b_sft/checkpoints/best" \
    "data.prompts=$SHARED/data/prompts.jsonl" "data.validation_prompts=$SHARED/data/validation_prompts.jsonl" \
    "reward.function=my_package.rewards:score"

job llama3_70b_ppo ppo llama3_70b_ppo \
    "model.restore_from=$SHARED/models/llama3-70b-sft" \
    "data.prompts=$SHARED/data/prompts.jsonl" "data.validation_prompts=$SHARED/data/validation_prompts.jsonl" \
    "reward.function=my_package.rewards:score" slurm.time=08:00:00 slurm.signal_s=900

job llama3_70b_ilql ilql llama3_70b_ilql \
    "model.restore_from=$SHARED/models/llama3-70b-sft" \
    "data.train=$SHARED/data/dialogues.jsonl" "data.validation=$SHARED/data/held_out.jsonl" \
    slurm.time=08:00:00 slurm.signal_s=900
