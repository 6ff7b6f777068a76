"""Corpus: the training images of a generator, with captions, creators and licences.

Reads an image folder, a `datasets` dataset, COCO, webdataset shards, URL tables or the emoji packages. Writes
corpus/data-*.parquet, looks.parquet, skipped.parquet (every file that did not become a training image, and why) and
manifest.json.

- stage: `CorpusConfig`, `open_source`, `run`.
- store: `Corpus` opens a written corpus; `write_corpus` writes one.
- images: `load_rgb`, `to_rgb`: any image file as 8-bit RGB.
- records: `TrainingImage`, `Skipped`, `Part`: what readers yield.
- folders, shards, tables, emoji: the readers.
- reservations: `honoured`, `OptOuts`: creators who say no.
- near_copies: `look_of`, `near_copies`: pictures that show the same thing.
"""
