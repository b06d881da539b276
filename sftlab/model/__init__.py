"""Models: base, random and hub models, adapters, merging."""
