#!/usr/bin/env bash
# MATH by the paper's recipe, on one GPU; type this at the top of the repository.
#   MATH: the directory of one-problem JSON files, a .jsonl, or a hub id
set -e
SENDER=Qwen/Qwen2.5-0.5B-Instruct
ACTOR=Qwen/Qwen2.5-0.5B

# stage 1; collect.py also writes messages_math/train.json, problem and solution under the same ids
python collect.py math --model_name_or_path $SENDER --dataset_path MATH --split train --output_dir messages_math \
    --max_new_tokens 1024
# stage 2
python train_actor.py --model_name_or_path $ACTOR --train_file messages_math/train.json --hidden_data messages_math \
    --output_dir actor_math --gradient_checkpointing true
# stage 4; --grader math_verify forgives more spellings than MATH's own rules: pip install math-verify[antlr4_13_2]
python eval_math.py --model_path actor_math --sender $SENDER --dataset MATH --split test --max_plan_tokens 1024 \
    --variants latent text no_comm cross_task --grader math_verify --output_dir results_math
