"""Gradients: what a denoising loss asks of a generator's weights.

losses       `encode_corpus`, `EncodedImages`: latents and conditioning, computed once; `denoising_losses`, `image_losses`
ekfac        `record_layers`, `example_gradients`: each example's weight gradient from one backward pass;
             `fit_ekfac`, `Factors`: the curvature that shapes an unlearning step
compression  `gradient_features`, `Compression`, `leading_coordinates`: a gradient as a short row; `RidgeKernel`: the kernel
             of TRAK and D-TRAK as a linear map

Reads a generator and a corpus; writes encoded/ and ekfac/ of a run folder when a stage asks for it.
"""
