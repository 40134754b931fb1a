"""Layers, parameters, MACs and activations of the networks, and what a training costs: ``distrib models``.

- ``count``: of a network, on torch's meta device, where nothing is computed.
- ``cost``: hours of a training, at the speeds that benchmarks have measured.
- ``table``: aligned columns.
"""
