"""Benchmarks: ``python -m distrib.tools.bench train|model|loader|inference|index|exchange|save|photos``.

Machines differ and are shared, so no figure stands alone: each is measured beside a peer, in turns, in one run. What
is told is the ratio of the two, with its spread over the pairs, and both sides' absolute figures.
"""
