"""Serve the models of a finished run."""
