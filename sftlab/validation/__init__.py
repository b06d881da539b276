"""Checks of the composed configuration."""
