"""The whole line: its config, its stages in order, what they cost, the report at the end."""
