"""Stage 2, on Ray Train with DeepSpeed: conversations -> cartridges."""
