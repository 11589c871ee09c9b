"""The life of a stored token. Nothing here knows of transformers or vLLM."""
