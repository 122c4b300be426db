"""Shared by all stages: manifests, progress and tables, Weights & Biases, a local Ray."""
