"""DOVER (arXiv 2211.04894): two networks that judge how a video looks, and how well it is made."""
