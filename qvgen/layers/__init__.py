"""The Linears of a quantized model, for training and for deployment, and how they are swapped in."""
