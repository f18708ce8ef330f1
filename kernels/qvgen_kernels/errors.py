"""Errors of the kernels that a caller may want to catch."""

from __future__ import annotations


class KernelUnavailableError(RuntimeError):
    """A kernel that was asked for does not run here, or can't run the layer; the message says why and what would."""
