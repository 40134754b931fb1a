"""Distributed training of ResNets on ImageNet: DDP, DALI, mixed precision, exact resume."""

__version__ = "0.1.0"
