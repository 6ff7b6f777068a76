"""Score training images for a query: the slow, accurate attributors that a student learns from."""
