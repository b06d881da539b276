"""Evaluation: generation, answers, scores, statistics."""
