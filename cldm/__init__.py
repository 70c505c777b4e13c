"""ControlNet on latent diffusion: configuration, whole model, checkpoint, and the reference algorithm."""
