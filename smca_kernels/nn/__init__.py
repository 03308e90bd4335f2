"""SMCA as modules."""
