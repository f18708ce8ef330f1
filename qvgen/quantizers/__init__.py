"""Quantizers with state: the learned parameters of one side of a Linear. One file each; none knows another."""
