"""Training: the LightningModule, its callbacks and strategies, and the processes that share the work."""
