#!/usr/bin/env bash
# The whole way from a Hugging Face checkpoint to a model trained with PPO, as four jobs of which each waits for the one
# before: conversion, SFT, reward model, PPO. The data are those of TL;DR, described in examples/README.md.
#
#   scripts/slurm/chain.sh CLUSTER_FILE SIZE HF_DIR SHARED_DIR [key=value ...]
#   scripts/slurm/chain.sh my_cluster.yaml 70b /shared/hf/llama2-70b /shared slurm.account=my_account
#
# SIZE is 7b (one node of 8 GPUs) or 70b (4, 4 and 8 nodes; eight hours, and the last quarter of an hour for a step and a
# save). Words after the four go to every job, and come last. The numbers of the jobs are printed; cancelling one cancels
# those that wait for it.
set -euo pipefail

if (($# < 4)); then
    sed -n '5,6s/^# *//p' "$0" >&2
    exit 2
fi
cluster=$1 size=$2 hf_dir=$3 shared=$4
more=("${@:5}")
if [[ $size == 70b ]]; then
    more=(slurm.time=08:00:00 slurm.signal_s=900 "${@:5}")
fi
data=$shared/data/tldr
model=$shared/models/tldr_$size
runs=$shared/runs/tldr_$size
judge=${runs}_reward/checkpoints/best

submit() { nemo-rlhf slurm "$@" --cluster "$cluster" ${more[@]+"${more[@]}"} --submit; }

convert=$(submit convert import "$hf_dir" "$model" \
    slurm.job_name="convert_$size" slurm.cpus_per_task=8)
sft=$(submit sft --after "$convert" --config "examples/tldr_${size}_sft" slurm.job_name="sft_$size" \
    model.restore_from="$model" data.train="$data/train" data.validation="$data/valid" \
    exp_manager.explicit_log_dir="${runs}_sft")
reward=$(submit reward --after "$sft" --config "examples/tldr_${size}_reward" slurm.job_name="reward_$size" \
    model.restore_from="${runs}_sft/checkpoints/best" data.train="$data/pairs" data.validation="$data/pairs_valid" \
    exp_manager.explicit_log_dir="${runs}_reward")
ppo=$(submit ppo --after "$reward" --config "examples/tldr_${size}_ppo" slurm.job_name="ppo_$size" \
    model.restore_from="${runs}_sft/checkpoints/best" model.critic.restore_from="$judge" \
    "reward.sources=[{kind: model, name: preference, restore_from: $judge, residence: swap, normalise: true}]" \
    data.prompts="$data/train" data.validation_prompts="$data/valid" \
    exp_manager.explicit_log_dir="${runs}_ppo")
echo "convert $convert, sft $sft, reward $reward, ppo $ppo"
