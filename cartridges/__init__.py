"""Cartridges: small KV caches trained by self-study to stand in for a corpus.

The package follows the data flow: corpus -> selfstudy -> distill -> cartridge -> artifact
-> registry -> engines -> evaluation. Nothing in it depends on Ray.
"""

__version__ = "0.1.0"
