"""RLHF on PyTorch Lightning."""
