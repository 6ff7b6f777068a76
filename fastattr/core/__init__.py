"""What every package shares: errors, atomic files and manifests, processes, the training loop, where models are found."""
