"""The optimizer: AdamW and its memory, the types of what it trains, tensors that visit a device."""
