"""Compares configurations over seeds: trains each one once a seed, and writes a table with p-values and a figure.

A study is a folder of configurations, one a variant: ``distrib study degradation --data DIR``.
"""
