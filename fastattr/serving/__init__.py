"""Serving: an attributor for machines over HTTP. `http`: `create_app`, `run`, `ServeConfig`, behind `fastattr serve`."""
