"""A step whose gradient or loss is no number leaves nothing behind, and the host does not wait to learn of it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from distrib.optim.ema import Ema


class Guard:
    """Decides whether a step is taken, and undoes what its forwards have done where it is not.

    The verdict is whether the norm of the reduced gradient is finite, and so is the same on all ranks without a word
    between them: ``weigh`` puts into the gradient whatever else is no number on one rank, and the all-reduce carries it
    to the others.

    With a fused optimizer the verdict stays on the device, and optimizer and average read it there as they read the
    loss scaler's (``found_inf`` of ``torch.optim``). Torch's other optimizers cannot: the host looks, which on a CPU,
    where alone they are used, costs nothing.

    Of the forwards there are to be undone the batch norms' running statistics and counters: in them a NaN would stay
    for ever. They are few numbers (53,173 in a ResNet-50, 212 KB) in many tensors (159), so they are copied to one
    flat tensor for each dtype, before the step and after it, and written back in a few launches. As views of one flat
    buffer they would need no copy, but torch.compile takes inputs that share memory for aliases of each other.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, network: nn.Module | None = None) -> None:
        """``network``: whose statistics are put back; those of norms in evaluation mode never change."""
        self._optimizer = optimizer
        self._on_device = bool(optimizer.defaults.get("fused"))
        modules = [] if network is None else [m for m in network.modules() if m.training]
        buffers = [buffer.detach() for module in modules for buffer in module.buffers(recurse=False)]
        dtypes = dict.fromkeys(buffer.dtype for buffer in buffers)
        self._buffers = [[b for b in buffers if b.dtype == dtype] for dtype in dtypes]
        self._before: list[torch.Tensor] = []

    def remember(self) -> None:
        """Before the first forward of a step: keeps the statistics as they are."""
        self._before = self._flat()

    @torch.no_grad()
    def weigh(self, loss: torch.Tensor, weight: float) -> torch.Tensor:
        """``weight`` as a factor for ``loss``, both []: NaN where the loss or a statistic is no number.

        Such a loss need not show in its own gradient: that of an infinite cross entropy is finite. Nor need a variance
        that overflows show in the loss. Multiplied by NaN they do, and a number changes no bit: 0 · x + weight.
        """
        told = loss.detach()
        for buffers in self._buffers:
            if buffers[0].is_floating_point():
                told = told + _joined(buffers).sum()
        return 0.0 * told + weight

    def judge(self, norm: torch.Tensor) -> torch.Tensor:
        """Whether the step with this norm of the gradient, fp32 [], is to be passed over: bool []."""
        return (norm - norm) != 0  # NaN for NaN and for infinities; in two launches, where isfinite takes four

    @torch.no_grad()
    def update(self, skipped: torch.Tensor, ema: Ema | None) -> None:
        """The optimizer's step, and the average's where one is due, or neither where the step is ``skipped``.

        Gradients must be unscaled by now. The loss scaler's own ``step`` is not called: it would give the optimizer its
        own verdict, which differs where finite gradients have a norm that overflows.
        """
        if self._on_device:
            found = skipped.float()
            self._optimizer.found_inf = found  # type: ignore[attr-defined]
            self._optimizer.step()
            del self._optimizer.found_inf  # type: ignore[attr-defined]
            self._put_back(skipped)
            if ema is not None:
                ema.update(found)
        elif skipped:
            self._put_back(skipped)
        else:
            self._optimizer.step()
            if ema is not None:
                ema.update()

    def _put_back(self, skipped: torch.Tensor) -> None:
        for buffers, before, after in zip(self._buffers, self._before, self._flat(), strict=True):
            chosen = torch.where(skipped, before, after).split([b.numel() for b in buffers])
            torch._foreach_copy_(buffers, [part.view(b.shape) for part, b in zip(chosen, buffers, strict=True)])

    def _flat(self) -> list[torch.Tensor]:
        return [_joined(buffers) for buffers in self._buffers]


def _joined(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])
