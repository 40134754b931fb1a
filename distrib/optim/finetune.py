"""Training a network that begins with weights: what stays as it is, and what learns more slowly.

Stages are the network's own children in forward order; the last one with parameters is the head. Blocks are the members
of the children that are sequences.
"""

from __future__ import annotations

from torch import nn

from distrib.config import UserError

HEAD = "fc"
BACKBONE = "backbone"  # all stages before the head, whatever the last of them is called


def freeze(network: nn.Module, last: str) -> None:
    """Keeps everything up to and with stage ``last`` as it is: neither its parameters nor its statistics change.

    "backbone" is all but the last stage. Norms are put into evaluation mode: they normalise with the statistics that
    came with the weights, as they will when the network is used, and do not depend on the batch. No backward runs
    through what is frozen.

    Raises:
        UserError: there is no such stage, or nothing would be left to train.
    """
    stages = [name for name, child in network.named_children() if next(child.parameters(), None) is not None]
    if last == BACKBONE:
        last = stages[-2]
    if last not in stages:
        raise UserError(
            f"optim.freeze {last!r} is no stage of the network; there are {', '.join(stages[:-1])}, {BACKBONE}"
        )
    if last == stages[-1]:
        raise UserError(f"optim.freeze {last} leaves nothing to train: {stages[-2]} trains {last} alone")
    for name, child in network.named_children():
        child.requires_grad_(False).eval()
        if name == last:
            return


def lr_factors(network: nn.Module, head_lr: float, layer_decay: float) -> dict[str, float]:
    """For each parameter's name, the factor on its learning rate.

    Counted from the end: the head has ``head_lr``, the last block ``layer_decay``, the one before it ``layer_decay``
    squared, and so on; the stem (conv1 and bn1) is one more block. A block is a residual block, not a stage: a
    ResNet-50's stem has ``layer_decay`` to the 17th. So do Clark et al. 2020 (ELECTRA, arXiv 2003.10555, section 3.1
    and appendix), Bao et al. 2021 (BEiT, arXiv 2106.08254) and timm (``param_groups_layer_decay``).
    """
    blocks = {name: _block(network, name) for name, _ in network.named_parameters()}
    order = list(dict.fromkeys(blocks.values()))
    factors = {block: layer_decay**distance for distance, block in enumerate(reversed(order))}
    if HEAD in factors:
        factors[HEAD] *= head_lr
    return {name: factors[block] for name, block in blocks.items()}


def _block(network: nn.Module, parameter: str) -> str:
    stage, _, rest = parameter.partition(".")
    if isinstance(getattr(network, stage), nn.Sequential):
        return f"{stage}.{rest.partition('.')[0]}"
    return HEAD if stage == HEAD else "stem"
