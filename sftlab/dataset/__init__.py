"""Datasets: rows, splits, prompts, tokens."""
