"""Metric modules of the ``evaluate`` library, inside the package so that no hub is asked for them."""
