#!/usr/bin/env bash
# LoRA on several GPUs with DeepSpeed ZeRO-2.
#     finetune/finetune_lora_ds.sh -m Qwen/Qwen-7B-Chat -d data.jsonl -o output -- --num_train_epochs 3
DEFAULT_MODEL=Qwen/Qwen-7B-Chat
ARGS=("$@")
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
launch distributed --use_lora True --gradient_checkpointing True --deepspeed "$ROOT/finetune/ds_config_zero2.json"
