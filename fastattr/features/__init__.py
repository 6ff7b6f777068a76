"""Frozen encoders of images and captions, their feature tables, and the candidate sets chosen by them."""
