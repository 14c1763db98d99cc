#!/bin/sh
# Q-LoRA on one GPU: over a GPTQ checkpoint, or with bitsandbytes over an unquantised one.
#     finetune/finetune_qlora_single_gpu.sh -m Qwen/Qwen-7B-Chat-Int4 -d data.jsonl -o output -- --num_train_epochs 3
. "$(dirname "$0")/common.sh"
parse Qwen/Qwen-7B-Chat-Int4 "$@"
shift "$PARSED"
launch single --q_lora True --gradient_checkpointing True "$@"
