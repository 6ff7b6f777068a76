"""Serving: an attributor for machines over HTTP; an image and prompt, or features, come in, the receipt goes out.

http   `create_app`, `run`, `ServeConfig`: the server behind `fastattr serve`
"""
