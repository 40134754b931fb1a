"""Writes a network as others read it, and compares: ``distrib export runs/pets --to onnx --output pets.onnx``.

- ``forms``: what forms there are; needs no torch.
- ``states``: state dicts under torchvision's and timm's names, and safetensors.
- ``graphs``: ONNX and torch.export.
- ``compare``: the file that was written against the network.
"""
