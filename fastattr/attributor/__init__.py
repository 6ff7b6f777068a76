"""The thing that answers: which training images influenced a picture, and how the catalogue of them changes.

Reads an attributor folder: a sealed base (config.json and the files that it names) and, once something has changed,
changes.sqlite. Writes such folders, receipts and tables of answers.

- `attributor`: `FastAttributor`, which loads, answers, takes images in and out, and saves.
- `attribution`: `Attribution`, one answer: results, shares, near-copies, receipt, figure, tables.
- `answers`: `by_student`, `by_features`, from one version to its answers; `inputs`: `open_image`, `where` and its checks.
- `version`: `Version`, one state of a folder; `catalogue`: `Catalogue`, the images of one state and the search among them.
- `changes`: what has changed since the base, in SQLite; `edits`: `add`, `remove`, `update`.
- `bases`: `compact`, `copy_newest`, `replacing`, which write bases; `folder`: config.json, seal, checksums.
- `load`: from a name to model and version, `read_info`; `make`: `build_attributor`, from a run folder to an attributor.
- `receipts`: `verify`, replay an answer; `many`: `run`, a table of queries; `collection` and `milvus`: beyond one machine.
"""
