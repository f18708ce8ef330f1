"""Open-Sora 1.2, which diffusers does not have: its transformer STDiT3, its VAE, its sampler and its folders."""
