"""Index: FAISS over the students' embeddings of the training images, from thousands to hundreds of millions.

Inner product on unit vectors is their cosine. What each kind of index costs and finds is measured in docs/search-index.md. An
index that compresses finds a short list, which is ranked again by exact similarities from float16 vectors that stay on disk.
Shards can be fetched and read one by one. FAISS reads no byte of a file whose SHA-256 is not the expected one.

Writes index.faiss (or shards of it), vectors.f16 and vectors.sha256; rows are numbered as the catalogue counts them.

choose: `IndexConfig`, `choose`, `estimate`; files: `save_index`, `load_index`, checked before FAISS sees them, `Vectors`,
`write_vectors`, exact float16 vectors on disk; search: `open_ranked`, `Ranked.search`; tune: `tune`,
`exact_neighbours`, `recall_of`; build: `build`, `add_shards`, `build_index`, from a stream of vectors to files.
"""
