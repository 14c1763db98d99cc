#!/usr/bin/env bash
# All weights on several GPUs with PyTorch alone (FSDP).
#     finetune/finetune_fsdp.sh -m Qwen/Qwen-7B-Chat -d data.jsonl -o output -- --num_train_epochs 3
DEFAULT_MODEL=Qwen/Qwen-7B-Chat
ARGS=("$@")
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
launch distributed --fsdp full_shard --fsdp_config "$ROOT/finetune/fsdp_config.json"
