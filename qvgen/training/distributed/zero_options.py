"""Sizes that DeepSpeed is given, which its plan counts with."""

from __future__ import annotations

BUCKET = 50_000_000
"""Numbers that are sent at once: 200 MB of float32."""

LIVE = 200_000_000
"""Numbers of weights that ZeRO-3 keeps whole at once, as far as it can: 800 MB of float32 (its default is 10^9)."""
