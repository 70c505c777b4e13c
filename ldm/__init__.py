"""The networks of latent diffusion in plain PyTorch, with the names of Stable Diffusion 1.5's checkpoint."""
