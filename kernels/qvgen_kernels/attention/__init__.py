"""Attention in 8 bits: its contract (kernels/attention.md), an exact reference, and what runs it on CPUs and GPUs."""

from qvgen_kernels.attention.contract import AttentionSpec, AttentionTensors
from qvgen_kernels.attention.op import attention, attention_kernels, resolve_attention

__all__ = ["AttentionSpec", "AttentionTensors", "attention", "attention_kernels", "resolve_attention"]
