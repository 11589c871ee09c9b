"""All that knows of transformers: the cache, its attention function, and what changes in a model."""
