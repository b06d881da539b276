"""Everything that knows Hydra."""
