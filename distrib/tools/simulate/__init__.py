"""A rank of a large run on paper: its plan, its share of the images, memory, checkpoints and rendezvous.

- ``rank``: all of it, computed in one process that takes the rank's place in a fake process group.
- ``sizes``: bytes of memory and of a checkpoint, from the network.
- ``report``: the lines for a person.
"""
