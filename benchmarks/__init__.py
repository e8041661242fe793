"""Measurements: what the kernels cost, against what they replace."""
