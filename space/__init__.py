"""Space: the Gradio page. Packaged as `fastattr.space`; also runs as a Hugging Face Space with `python app.py`."""
