"""The Hydra application: nothing else in the package imports Hydra, except the grammar in ``validation.overrides``."""
