"""Training checkpoints as they lie on a disk: one file or a folder of parts, written whole and checked before use."""
