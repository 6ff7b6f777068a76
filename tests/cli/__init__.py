"""Tests of one package, named as it is."""
