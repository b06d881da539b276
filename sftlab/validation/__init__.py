"""Validation of a configuration before a model is loaded: keys and types, combinations, files and rows."""
