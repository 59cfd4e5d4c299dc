"""What ``nemo-rlhf COMMAND --help`` shows below its arguments: an example that works, and the exit codes."""

from __future__ import annotations

EXIT_CODES = """\
exit codes:
  0    done
  1    failed (a traceback says where); of convert verify: the two disagree
  2    wrong input, a full disk or a NaN loss (one sentence says what and where)
  69   a reward service stayed away; everything is saved: run the same command again when it is back
  75   stopped by SIGTERM or SIGUSR1 after saving: run the same command again to continue
"""

PPO = """\
example:
  nemo-rlhf ppo model.restore_from=/models/llama-sft data.prompts=prompts.jsonl \\
      reward.function=my_package.rewards:score exp_manager.explicit_log_dir=runs/ppo \\
      trainer.devices=8 model.tensor_model_parallel_size=4 trainer.precision=bf16

Every key with its default is in {conf}/ppo.yaml. The same command again continues an interrupted run.

"""

SFT = """\
example:
  nemo-rlhf sft model.restore_from=/models/llama data.train=train.jsonl data.validation=validation.jsonl \\
      exp_manager.explicit_log_dir=runs/sft trainer.devices=8 trainer.max_steps=1000

Every key with its default is in {conf}/sft.yaml. The same command again continues an interrupted run.

"""

ILQL = """\
example:
  nemo-rlhf ilql model.restore_from=/models/llama-sft data.train=dialogues.jsonl \\
      exp_manager.explicit_log_dir=runs/ilql trainer.devices=8 trainer.max_steps=1000

Every key with its default is in {conf}/ilql.yaml. The same command again continues an interrupted run.

"""

RFT = """\
example:
  nemo-rlhf rft model.restore_from=/models/llama-sft data.prompts=prompts.jsonl \\
      reward.function=my_package.rewards:score exp_manager.explicit_log_dir=runs/rft trainer.devices=8

Every key with its default is in {conf}/rft.yaml. The same command again continues an interrupted run.

"""

REWARD = """\
example:
  nemo-rlhf reward model.restore_from=/models/llama-sft data.train=pairs.jsonl data.validation=held_out.jsonl \\
      exp_manager.explicit_log_dir=runs/reward trainer.devices=8 trainer.max_epochs=1 trainer.val_check_interval=50

Every key with its default is in {conf}/reward.yaml. The same command again continues an interrupted run.

"""

GENERATE = """\
example:
  nemo-rlhf generate runs/sft/checkpoints/best --prompts prompts.jsonl --out responses.jsonl \\
      generation.temperature=0 generation.max_new_tokens=128 trainer.devices=2 model.tensor_model_parallel_size=2

Every key with its default is in {conf}/generate.yaml.

"""

SERVE_REWARD = """\
example:
  nemo-rlhf serve-reward runs/reward/checkpoints/best server.host=0.0.0.0 server.port=0 \\
      server.token_env=REWARD_TOKEN server.url_file=/shared/reward.url trainer.devices=2 \\
      model.tensor_model_parallel_size=2

Every key with its default is in {conf}/serve-reward.yaml. What it speaks is in docs/rewards.md.

"""

PLAN = """\
examples:
  nemo-rlhf plan plan.model=llama3-70b cluster.nodes=16
  nemo-rlhf plan plan.model=/models/Meta-Llama-3-8B plan.algorithm=sft plan.response_tokens=3072 --top 1
  nemo-rlhf plan plan.model=llama3-8b plan.num_prompts=1024 --write planned.yaml
  nemo-rlhf ppo --config planned.yaml model.restore_from=/models/Meta-Llama-3-8B ...

Every key with its default is in {conf}/plan.yaml; how it counts is in docs/planning.md.

"""

DATA = """\
examples:
  nemo-rlhf data train.jsonl
  nemo-rlhf data pairs.parquet --for pairs model.restore_from=/models/llama-sft
  nemo-rlhf data gsm8k.jsonl.gz 'data.fields={prompt: question, response: answer}'

Every key with its default is in {conf}/data.yaml; the forms of records are in docs/data.md.

"""

SLURM = """\
examples:
  nemo-rlhf slurm ppo --cluster my_cluster.yaml --config examples/llama3_70b_ppo trainer.num_nodes=16 \\
      model.restore_from=/shared/llama3-70b-sft data.prompts=prompts.jsonl reward.function=my_package.rewards:score \\
      exp_manager.explicit_log_dir=/shared/runs/ppo slurm.time=08:00:00 --test-only
  nemo-rlhf slurm convert import /hf/llama3-8b /shared/llama3-8b --cluster cluster/pyxis --submit

Every key of slurm with its default is in {conf}/slurm.yaml, files for kinds of clusters are in {conf}/cluster; the way
from a plan to a job is in docs/slurm.md.

"""

FEEDBACK = """\
examples:
  nemo-rlhf feedback invite --store feedback.db --run runs/ppo alice
  nemo-rlhf feedback serve --store feedback.db --run runs/ppo --guidelines guidelines.md
  nemo-rlhf feedback import --store feedback.db --run runs/ppo pairs.jsonl
  nemo-rlhf feedback export --store feedback.db --run runs/ppo pairs.jsonl
  nemo-rlhf feedback export --store feedback.db --run runs/ppo chats --form conversational
  nemo-rlhf feedback simulate --store feedback.db --run runs/ppo --prefer my_package.taste:score --watch

What it stores and how people work with it is in docs/feedback.md.

"""

REPORT = """\
example:
  nemo-rlhf report runs/ppo

"""

CONVERT = """\
examples:
  nemo-rlhf convert import /models/Meta-Llama-3-8B checkpoints/llama3-8b
  nemo-rlhf convert verify /models/Meta-Llama-3-8B checkpoints/llama3-8b
  nemo-rlhf convert inspect runs/ppo/checkpoints/best
  nemo-rlhf convert export runs/ppo/checkpoints/best exported/llama3-8b-ppo
  nemo-rlhf convert export runs/ppo/checkpoints/best/critic exported/llama3-8b-critic

"""
