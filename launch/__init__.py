"""Trains here, on several machines or as Slurm jobs; lists, follows and stops runs.

Imports no torch: a cluster's login node has none.
"""
