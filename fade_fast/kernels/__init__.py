"""Arithmetic on tensors: what a tier computes. Nothing here knows of caches, layers or models."""
