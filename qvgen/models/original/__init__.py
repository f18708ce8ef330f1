"""Names and tensors of the code that a model was published with, beside those of diffusers."""
