"""The whole chain, from a corpus to a version in the registry: one cartridge, a collection, or an ablation."""
