"""Starts training through torchrun.

Imports no torch: a cluster's login node has none.
"""
