"""The quantized attention in Triton as kernels/attention.md defines it, and the sums of its gradient.

    form      constants, pointers and sizes of the kernels, and how codes lie in memory
    quantize  means over tokens; queries, keys and values to codes and scales
    block     scores of a tile and a block of keys to probabilities
    attend    scores, probabilities and the running sums of a tile of queries
    gradient  the sums of the backward pass, by queries and by keys
    backend   a call from q, k and v to outputs; what is missing on a machine

Memory besides the outputs: the codes of q, k and v (a byte a number, columns padded to a power of two), their scales, and
three float32 numbers for every 64 tokens and column while values are quantized. Nothing grows with tokens times tokens.

Importing the package does not import Triton.
"""
