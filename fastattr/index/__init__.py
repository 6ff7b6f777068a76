"""Find the nearest embeddings: FAISS indexes chosen from size, memory and recall wanted."""
