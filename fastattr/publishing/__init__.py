"""Publishing: send what a run made to the Hugging Face Hub, and import what others released.

Reads a run folder or an embedded model; writes repositories on the Hub (one commit a push) and, for imports, attributor
and score-table folders.

- `publish`: `push_attributor`, `push_generator`, `push_space`, `push_all` (all that a run holds), `PushConfig`.
- `score_tables`: `push_scores`, a score table as one configuration of a dataset.
- `push`: `push_folder`, the one function that changes a repository; `release_tag`.
- `cards`, `licences`, `tables`: README.md and LICENSE.md of a repository, from manifests, metrics and catalogue alone.
- `statement`: `make_statement`, `verify_statement`: a pool of money divided by the receipts of a period.
- `fastgda`: `import_attributor`, `import_scores`, from the files that the paper's authors released.
"""
