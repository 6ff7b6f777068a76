"""The Hugging Face Hub: cards, pushes, and importing what others released."""
