#!/bin/sh
# Q-LoRA on several GPUs with DeepSpeed ZeRO-2.
#     finetune/finetune_qlora_ds.sh -m Qwen/Qwen-7B-Chat-Int4 -d data.jsonl -o output -- --num_train_epochs 3
. "$(dirname "$0")/common.sh"
parse Qwen/Qwen-7B-Chat-Int4 "$@"
shift "$PARSED"
launch distributed --q_lora True --gradient_checkpointing True --deepspeed "$ROOT/finetune/ds_config_zero2.json" "$@"
