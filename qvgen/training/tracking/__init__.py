"""Where a training's numbers, videos and files go besides its own folder: Weights & Biases, and anyone's loggers."""
