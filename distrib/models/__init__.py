"""Networks: ResNet and its relatives, by name."""

from distrib.models.resnet import MODEL_NAMES, build_model

__all__ = ["MODEL_NAMES", "build_model"]
