"""Bits per layer under a budget: how much every unit of layers suffers is measured, then the widths are allocated."""
