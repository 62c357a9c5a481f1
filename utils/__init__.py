"""Leaf helpers: configuration, ranks, checkpoints, data, metrics. Nothing here knows diffusion."""
