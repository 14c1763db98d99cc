"""Train a classifier, or a reward model (--num-labels 1), with LoRA on a head in place of the language model's.

python examples/train_classifier.py -c demo -o output_classifier

The texts here are a toy; replace EXAMPLES by your own pairs of text and label (a float for a reward model).
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import qwen  # noqa: F401  (makes the Auto classes know the architecture)
from utils import find_checkpoint

EXAMPLES = [("I love this film.", 1), ("What a waste of time.", 0), ("Wonderful acting!", 1), ("I was bored.", 0)]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-c", "--checkpoint-path", default="demo", help="directory, hub name or `demo`")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="DIR", help="directory of the adapter")
    parser.add_argument("--num-labels", type=int, default=2, help="classes; 1 is a reward (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=20, help="steps of training (default: %(default)s)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> float:
    """The loss of the last step."""
    args = parse_args(argv)
    torch.manual_seed(0)
    directory = find_checkpoint(args.checkpoint_path)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForSequenceClassification.from_pretrained(directory, num_labels=args.num_labels, dtype="float32")
    lora = LoraConfig(task_type="SEQ_CLS", r=8, target_modules=["c_attn", "w1", "w2"])  # the head is trained whole
    model = get_peft_model(model, lora)
    batch = tokenizer([text for text, _ in EXAMPLES], padding=True, return_tensors="pt")
    labels = torch.tensor([label for _, label in EXAMPLES])
    labels = labels.float() if args.num_labels == 1 else labels
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-3)
    for step in range(args.steps):
        loss = model(**batch, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step + 1}: loss {loss.item():.4f}")
    model.save_pretrained(args.output)
    print(f"Saved in {args.output}.")
    return loss.item()


if __name__ == "__main__":
    main()
