"""Compilation of kernels. All other folders get their compiled functions from here."""
