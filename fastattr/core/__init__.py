"""Core: what all stages share. Reads and writes files, knows nothing of images or models' insides.

- errors: every error that a user can mend derives from `FastattrError`.
- files: `atomic_path`, `read_json`, `write_json`, `sha256_file`: files are whole or absent.
- stages: `make` runs a stage once and writes its manifest.json; `open_stage`, `require_same`, `fingerprint`.
- processes: `split_between`, `in_parts` split a stage's work over the processes of `accelerate launch`.
- training: `fit` trains a module from a checkpoint on, with averaged weights.
- models: `locate`, `fetch` find a model in the package, in a folder or on the Hub; Hub errors in words.
- captions: `split_caption`, `recombine`: subject and style of a caption.
"""
