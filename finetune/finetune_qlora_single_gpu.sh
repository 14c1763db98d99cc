#!/usr/bin/env bash
# Q-LoRA on one GPU: over a GPTQ checkpoint, or with bitsandbytes over an unquantised one.
#     finetune/finetune_qlora_single_gpu.sh -m Qwen/Qwen-7B-Chat-Int4 -d data.jsonl -o output -- --num_train_epochs 3
DEFAULT_MODEL=Qwen/Qwen-7B-Chat-Int4
ARGS=("$@")
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
launch single --q_lora True --gradient_checkpointing True
