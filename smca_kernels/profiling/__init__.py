"""Measure calls of the operator."""
