"""Features: frozen encoders turn images and prompts into vectors, in which candidates are chosen and students learn.

Reads corpus/ and queries/; writes features/<encoder>/ and query_features/<encoder>/, then candidates/.

- `encoder`: what every encoder offers (`Encoder`), in NumPy.
- `kinds`: `open_encoder` opens a specification such as 'open_clip-image:encoder'; a new kind is an entry of `KINDS`.
- `pretrained`: image and text towers that open_clip and transformers load.
- `light_clip`: the small embedded CLIP in NumPy, for a first answer without torch.
- `by_generator`: features by the generator itself, of its middle block or of its gradients.
- `store`: feature folders; `read_features`, `write_features`.
- `stage`: `FeaturesConfig`, `run` (`fastattr features`).
- `candidates`: the training images that the teacher scores for each query; `run` (`fastattr candidates`).
"""
