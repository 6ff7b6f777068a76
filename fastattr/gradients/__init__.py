"""What a denoising loss asks of the weights: losses, gradients, EKFAC curvature, compression."""
