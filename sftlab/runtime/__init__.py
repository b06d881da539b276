"""Stages, processes, runs and jobs: nothing about language models."""
