"""The text-to-image model under study: one adapter for every diffusers pipeline, its queries, and training one from nothing."""
