"""Programs around the trainer. Each stands alone: ``python -m distrib.tools.NAME --help``."""
