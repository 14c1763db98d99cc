#!/bin/sh
# All weights on several GPUs with PyTorch alone (FSDP).
#     finetune/finetune_fsdp.sh -m Qwen/Qwen-7B-Chat -d data.jsonl -o output -- --num_train_epochs 3
. "$(dirname "$0")/common.sh"
parse Qwen/Qwen-7B-Chat "$@"
shift "$PARSED"
launch distributed --fsdp full_shard --fsdp_config "$ROOT/finetune/fsdp_config.json" "$@"
