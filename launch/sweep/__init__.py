"""``launch sweep``: trains a configuration with each combination of values, and makes one table of the results."""

from launch.sweep.command import main

__all__ = ["main"]
