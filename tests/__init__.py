"""Tests: one claim a test, offline, on CPU."""
