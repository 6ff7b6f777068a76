"""Answer attribution queries over HTTP."""
