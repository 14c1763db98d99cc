"""What finetune.py is made of: data, masks, packing, attention over packs, adapters, the trainer and what it saves."""
