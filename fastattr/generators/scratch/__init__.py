"""Train a small Stable Diffusion from nothing: autoencoder, denoiser and text encoder, and a small CLIP."""
