"""Cartridges: small KV caches trained by self-study to stand in for a corpus.

The tree is the data flow: corpus -> selfstudy -> distill -> cartridge -> artifact
-> registry -> engines -> evaluation. Nothing in this package knows of Ray.
"""

__version__ = "0.1.0"
