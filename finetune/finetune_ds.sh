#!/bin/sh
# All weights on several GPUs with DeepSpeed ZeRO-3.
#     finetune/finetune_ds.sh -m Qwen/Qwen-7B-Chat -d data.jsonl -o output -- --num_train_epochs 3
. "$(dirname "$0")/common.sh"
parse Qwen/Qwen-7B-Chat "$@"
shift "$PARSED"
launch distributed --gradient_checkpointing True --deepspeed "$ROOT/finetune/ds_config_zero3.json" "$@"
