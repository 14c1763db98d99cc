#!/bin/sh
# LoRA on several GPUs with DeepSpeed ZeRO-2.
#     finetune/finetune_lora_ds.sh -m Qwen/Qwen-7B-Chat -d data.jsonl -o output -- --num_train_epochs 3
. "$(dirname "$0")/common.sh"
parse Qwen/Qwen-7B-Chat "$@"
shift "$PARSED"
launch distributed --use_lora True --gradient_checkpointing True --deepspeed "$ROOT/finetune/ds_config_zero2.json" "$@"
