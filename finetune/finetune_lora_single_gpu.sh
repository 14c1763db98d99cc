#!/bin/sh
# LoRA on one GPU.
#     finetune/finetune_lora_single_gpu.sh -m Qwen/Qwen-7B-Chat -d data.jsonl -o output -- --num_train_epochs 3
. "$(dirname "$0")/common.sh"
parse Qwen/Qwen-7B-Chat "$@"
shift "$PARSED"
launch single --use_lora True --gradient_checkpointing True "$@"
