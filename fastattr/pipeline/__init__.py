"""Pipeline: the whole line from one config, and what it will cost.

Reads a YAML config and the stages' folders of a run; writes config.yaml, plan.json, spent.json, card/ and report/ of the run.

- `config`: `BuildConfig` (one section a stage), `load_config`, `save_config`, `check`.
- `stages`: `STAGES`, the line as a table of functions of (config, run folder).
- `build`: `run` (all stages, resuming), `run_stage`, `planned`, `embed_assets`.
- `plan`: `plan` and `as_table`, what `fastattr plan` prints; counts, memory, disk and hours of each stage.
- `networks`: operations of a denoiser's shape, and how many this machine does.
- `report`: `run`, one static page about a finished build.
"""
