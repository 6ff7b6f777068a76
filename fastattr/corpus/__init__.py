"""Training images, their captions and creators: reading them, and keeping them as a stage folder."""
