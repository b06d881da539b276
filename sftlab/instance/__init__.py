"""The machine: devices, ranks, precision, preflight checks."""
