"""Measurements of a cache on a model: quality, memory, recall and speed. The commands run them."""
