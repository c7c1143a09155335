#!/usr/bin/env bash
# ALFWorld by the paper's recipe: plans and states of an Instruct model, actors that start from its Base
# counterpart. One GPU; type this at the top of the repository.
#   alfworld_sft.json: ETO's conversations, hub data set agent-eto/eto-sft-trajectory
#   the games: pip install alfworld && alfworld-download
set -e
SENDER=Qwen/Qwen2.5-0.5B-Instruct
ACTOR=Qwen/Qwen2.5-0.5B
DATA="--train_file alfworld_sft.json --task_turn 2 --hidden_data messages"
PLAY="--env alfworld --split valid_seen"

# stage 1: 3,119 plans and their states
python collect.py alfworld --model_name_or_path $SENDER --dataset_path alfworld_sft.json --output_dir messages \
    --do_sample true --temperature 0.7 --batch_size 64
# stage 2: the actor learns to read them
python train_actor.py --model_name_or_path $ACTOR $DATA --output_dir actor --eval_ratio 0.05 \
    --gradient_checkpointing true
# stage 4: the sender is asked about the games, and the actor plays them
python eval_alfworld.py --model_path actor --sender $SENDER $PLAY --output_path results \
    --variants latent text no_comm cross_task randomrot

# the paper's two trained baselines, in one table
python train_actor.py --model_name_or_path $ACTOR $DATA --message text --output_dir actor_text
python train_actor.py --model_name_or_path $ACTOR $DATA --message none --output_dir actor_none
python eval_alfworld.py --model_path actor --baseline_path actor_text actor_none --sender $SENDER $PLAY \
    --variants latent cot_full no_cot --output_path results_baselines

# stage 3: compression to K = 8
python compress.py --teacher_model_name_or_path actor --student_model_name_or_path $ACTOR $DATA \
    --output_dir student --K 8
python eval_alfworld.py --model_path actor --sender student --latent_steps 8 $PLAY --output_path results_k8

# 7B on 8 GPUs: the same scripts; --fsdp shards what Adam needs
torchrun --nproc_per_node 8 collect.py alfworld --model_name_or_path Qwen/Qwen2.5-7B-Instruct \
    --dataset_path alfworld_sft.json --output_dir messages_7b --do_sample true --temperature 0.7
torchrun --nproc_per_node 8 train_actor.py --model_name_or_path Qwen/Qwen2.5-7B --train_file alfworld_sft.json \
    --task_turn 2 --hidden_data messages_7b --output_dir actor_7b --fsdp true --gradient_checkpointing true \
    --per_device_train_batch_size 2
torchrun --nproc_per_node 8 eval_alfworld.py --model_path actor_7b --sender Qwen/Qwen2.5-7B-Instruct $PLAY \
    --variants latent text no_comm --output_path results_7b

# across families: Llama reads Qwen's states; the adapter's input_projector goes from one width to the other
# (Instruct, because Llama's Base has no chat template)
torchrun --nproc_per_node 8 train_actor.py --model_name_or_path meta-llama/Llama-3.1-8B-Instruct --fsdp true \
    --gradient_checkpointing true --train_file alfworld_sft.json --task_turn 2 --hidden_data messages_7b \
    --output_dir actor_llama

# two machines: on each, with its own --node_rank
# torchrun --nnodes 2 --node_rank 0 --master_addr HOST --nproc_per_node 8 train_actor.py ...
