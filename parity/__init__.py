"""Tests whether `fade_fast` computes the same as the specification `fade_ref`."""
