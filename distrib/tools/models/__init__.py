"""Layers, parameters, MACs and activations of the networks, and what a training costs: ``distrib models``.

- ``count``: our networks' counts beside torchvision's.
- ``cost``: hours of a training, at the speeds that benchmarks have measured.
- ``table``: aligned columns.
"""
