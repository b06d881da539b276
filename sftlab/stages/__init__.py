"""One module a stage; none knows another."""
