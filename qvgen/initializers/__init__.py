"""Where quantized layers start: PTQ methods, one leaf each."""
