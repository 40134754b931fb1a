"""Compares two runs bit by bit, and hashes a checkpoint: ``distrib trace diff A B``, ``distrib trace hash RUN``.

Needs runs of ``trace=true``. Files of any length are read line by line.
"""
