"""Proves that `fade_fast` computes what `fade_ref` says."""
