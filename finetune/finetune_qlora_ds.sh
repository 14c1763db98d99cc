#!/usr/bin/env bash
# Q-LoRA on several GPUs with DeepSpeed ZeRO-2.
#     finetune/finetune_qlora_ds.sh -m Qwen/Qwen-7B-Chat-Int4 -d data.jsonl -o output -- --num_train_epochs 3
DEFAULT_MODEL=Qwen/Qwen-7B-Chat-Int4
ARGS=("$@")
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
launch distributed --q_lora True --gradient_checkpointing True --deepspeed "$ROOT/finetune/ds_config_zero2.json"
