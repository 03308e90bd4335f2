"""The implementations of the operator: a backend's name is its path."""
