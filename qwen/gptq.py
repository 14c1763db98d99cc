"""GPTQ (Frantar et al., 2022): round a layer's weights input by input, each error made good by those still to come.

What counts as an error is measured on real inputs, by their second moments H = X^T X. Inputs are taken in order of
importance, but only within groups and group by group, so that the result needs no act order when it runs.
"""

import torch
from torch import Tensor

from .errors import QwenError

SHRINKAGE = torch.linspace(1.0, 0.5, 26)  # scales that are tried for a group, in parts of the one that covers its range


def quantize_weight(
    weight: Tensor, hessian: Tensor, bits: int = 4, group_size: int = 128, damp: float = 0.05
) -> tuple[Tensor, Tensor]:
    """The numbers (in, out) uint8 and scales (in / group_size, out) float16 for a weight (out, in) in float32.

    Args:
        hessian: (in, in) float32, the sum of x x^T over the layer's inputs.
        damp: what is added to the hessian's diagonal, in parts of its mean.

    Raises:
        QwenError: the hessian holds NaN or infinity, or is singular in spite of damping.
    """
    rows, columns = weight.shape
    if not hessian.isfinite().all():
        raise QwenError("the inputs hold NaN or infinity: is the checkpoint whole, and its precision wide enough?")
    unused = hessian.diagonal() == 0  # inputs that calibration never saw: their weights count for nothing
    hessian = hessian + torch.diag(unused.to(hessian.dtype))
    order = importance_order(hessian.diagonal(), group_size)
    weight = weight[:, order].masked_fill(unused[order], 0.0)
    factor = inverse_factor(hessian[order][:, order], damp)

    middle, numbers = 2 ** (bits - 1), torch.empty(columns, rows, dtype=torch.uint8, device=weight.device)
    scales = torch.empty(columns // group_size, rows, dtype=torch.float16, device=weight.device)
    for start in range(0, columns, group_size):
        group = weight[:, start : start + group_size].clone()  # (out, G)
        block = factor[start : start + group_size, start : start + group_size]
        scale = find_scales(group, bits, block.diagonal().square().reciprocal())
        errors = torch.empty_like(group)
        for i in range(group_size):
            number = (group[:, i] / scale).round().clamp_(-middle, middle - 1)
            errors[:, i] = (group[:, i] - number * scale) / block[i, i]
            group[:, i + 1 :] -= errors[:, i, None] * block[i, i + 1 :]
            numbers[start + i] = (number + middle).to(torch.uint8)
        weight[:, start + group_size :] -= errors @ factor[start : start + group_size, start + group_size :]
        scales[start // group_size] = scale.half()
    back = order.argsort()
    return numbers[back], scales[back[::group_size] // group_size]


def importance_order(importance: Tensor, group_size: int) -> Tensor:
    """A permutation (in,) that sorts inputs within their groups, and the groups as wholes, most important first."""
    groups = importance.view(-1, group_size)
    within = groups.argsort(dim=1, descending=True) + torch.arange(
        0, importance.numel(), group_size, device=importance.device
    ).unsqueeze(1)
    return within[groups.amax(1).argsort(descending=True)].flatten()


def inverse_factor(hessian: Tensor, damp: float) -> Tensor:
    """The upper Cholesky factor of the inverse of the damped hessian: row i says how input i's error spreads."""
    mean = hessian.diagonal().mean()
    for _ in range(5):
        damped = hessian + torch.eye(len(hessian), device=hessian.device) * (damp * mean)
        factor, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            inverse = torch.cholesky_inverse(factor)
            factor, failed = torch.linalg.cholesky_ex(inverse, upper=True)
            if not failed:
                return factor
        damp = 2 * damp + 0.01
    raise QwenError("the calibration inputs are too much alike to quantise with: give more text, or more --damp")


def find_scales(group: Tensor, bits: int, importance: Tensor) -> Tensor:
    """The scale of each output (out,) for weights (out, G): the tried one with the least error, weighted by (G,)."""
    middle = 2 ** (bits - 1)
    widest = group.abs().amax(1).clamp(min=1e-5) / (middle - 0.5)
    best, least = widest, torch.full_like(widest, torch.inf)
    for part in SHRINKAGE.tolist():
        scale = (widest * part).half().float().clamp(min=1e-7)  # as it will be stored
        number = (group / scale[:, None]).round_().clamp_(-middle, middle - 1)
        error = (number.mul_(scale[:, None]).sub_(group).square_() * importance).sum(1)
        best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
    return best
