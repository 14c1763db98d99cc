#!/usr/bin/env bash
# All weights on several GPUs with DeepSpeed ZeRO-3.
#     finetune/finetune_ds.sh -m Qwen/Qwen-7B-Chat -d data.jsonl -o output -- --num_train_epochs 3
DEFAULT_MODEL=Qwen/Qwen-7B-Chat
ARGS=("$@")
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
launch distributed --gradient_checkpointing True --deepspeed "$ROOT/finetune/ds_config_zero3.json"
