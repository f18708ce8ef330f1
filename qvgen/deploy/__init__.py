"""Deployment: packed checkpoints, and generation with the model that they hold."""
