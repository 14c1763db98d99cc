#!/usr/bin/env bash
# LoRA on one GPU.
#     finetune/finetune_lora_single_gpu.sh -m Qwen/Qwen-7B-Chat -d data.jsonl -o output -- --num_train_epochs 3
DEFAULT_MODEL=Qwen/Qwen-7B-Chat
ARGS=("$@")
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
launch single --use_lora True --gradient_checkpointing True
