"""Evaluates weights, ours or anybody's ResNet: ``distrib evaluate runs/resnet18-pets``.

The run's own loader, arithmetic and evaluator are used, so that the figures are those of its log.
"""
