"""Cross entropy of next tokens that never holds all logits: with 151,936 columns they would be the peak of memory.

For 8192 tokens the float32 logits of Qwen-7B alone take 5 GB, and their gradient as much again. Here a few hundred rows
exist at a time, and only rows that carry loss.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

IGNORED = -100
CHUNK_ELEMENTS = 2**25  # float32 logits at a time: 128 MiB
WIDENED_ELEMENTS = 2**21  # of a weight at a time, 8 MiB


class LMHead(nn.Linear):
    """The head (C to V) of a language model, which can go on to the loss itself.

    The loss is computed in this module's forward because ZeRO-3 and FSDP hold its weight together only within that.
    """

    def forward(self, hidden: Tensor, labels: Tensor | None = None, num_items: int | Tensor | None = None) -> Tensor:
        """Logits (..., V) float32 of hidden states (..., C); with `labels` (B, T) the mean loss of next tokens instead.

        Args:
            labels: the tokens themselves, -100 where a token carries no loss; they are shifted here.
            num_items: divides the summed loss, by default the number of tokens that carry loss in `labels`.
        """
        if labels is None:
            if torch.is_autocast_enabled(hidden.device.type):
                return super().forward(hidden).float()
            return float32_logits(hidden, self.weight)
        targets = labels[:, 1:].to(hidden.device)
        carries = targets != IGNORED
        hidden, targets = hidden[:, :-1][carries], targets[carries]  # (N, C), (N,)
        if num_items is None:
            num_items = max(len(targets), 1)
        elif isinstance(num_items, Tensor):
            num_items = num_items.to(hidden.device)
        return summed_loss(hidden, self.weight, targets) / num_items


def float32_logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """The product (..., V) in float32 of hidden states (..., C) with `weight` (V, C), summed in float32.

    Rounded to bfloat16, a logit of 24 has neighbours 0.125 apart, and the likeliest tokens tie.
    """
    if weight.dtype == torch.float32:
        return linear(hidden.float(), weight)
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        return linear(hidden.float(), weight.float())
    rows = hidden.reshape(-1, hidden.shape[-1])
    if hidden.device.type == "cuda":
        logits = torch.mm(rows, weight.t(), out_dtype=torch.float32)
    else:  # no such product there: a part of the weight at a time, widened
        size = max(WIDENED_ELEMENTS // weight.shape[1], 1)
        logits = torch.cat([linear(rows.float(), part.float()) for part in weight.split(size)], dim=-1)
    return logits.view(*hidden.shape[:-1], weight.shape[0])


def summed_loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The summed cross entropy () in float32 of hidden states (N, C) under `weight` (V, C) for `targets` (N,)."""
    if torch.is_autocast_enabled(hidden.device.type):
        hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
    return _SummedLoss.apply(hidden, weight, targets, torch.is_grad_enabled())


class _SummedLoss(torch.autograd.Function):
    """Each chunk's gradient is computed along with its loss, so that its logits are needed only once.

    The gradients are those of the sum: in float16 those of the mean would vanish before the loss is scaled.
    """

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, hidden: Tensor, weight: Tensor, targets: Tensor,
                differentiable: bool) -> Tensor:  # fmt: skip
        wants_hidden, wants_weight = (differentiable and needed for needed in ctx.needs_input_grad[:2])
        matrix = weight.to(hidden.dtype)
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if wants_weight else None
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        rows = max(CHUNK_ELEMENTS // weight.shape[0], 16) * (4 if wants_weight else 1)  # to add to (V, C) less often
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, len(targets), rows):
                chunk, target = hidden[start : start + rows], targets[start : start + rows, None]
                logits = linear(chunk, matrix).float()
                logits -= logits.logsumexp(-1, keepdim=True)
                loss -= logits.gather(-1, target).sum()
                if wants_hidden or wants_weight:
                    grad = logits.exp_().scatter_add_(-1, target, logits.new_full((1, 1), -1.0).expand_as(target))
                    grad = grad.to(hidden.dtype)
                    if wants_hidden:
                        torch.mm(grad, matrix, out=grad_hidden[start : start + rows])
                    if wants_weight:
                        grad_weight += grad.T @ chunk
        ctx.dtype = weight.dtype
        ctx.save_for_backward(grad_hidden, grad_weight)
        return loss

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = (grad_hidden * grad).to(grad_hidden.dtype)
        if grad_weight is not None:
            grad_weight = grad_weight.mul_(grad).to(ctx.dtype)
        return grad_hidden, grad_weight, None, None
