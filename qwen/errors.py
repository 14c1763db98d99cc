"""The one error whose message is written for the person at the keyboard, and how to quote another in it."""

import torch


class QwenError(RuntimeError):
    """A user's mistake or a broken file, told in one sentence: what is wrong, where, and what to do.

    Entry points print the message and exit with a non-zero status; nothing else in the project does.
    """


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its name if it has none: enough to quote in a sentence."""
    return str(error).strip().split("\n")[0] or type(error).__name__


def not_finite(dtype: torch.dtype) -> QwenError:
    """What to tell of NaN or infinite logits to whoever loaded the weights in this type."""
    if dtype == torch.float16:
        cause = "float16 overflowed; load the model in bfloat16 (bf16=True, --dtype bf16) or in float32"
    else:
        cause = f"the weights ({dtype}) are damaged, or training diverged; check where the checkpoint is from"
    return QwenError(f"the model's logits are NaN or infinite: {cause}")
