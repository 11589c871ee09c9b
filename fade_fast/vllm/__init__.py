"""A plugin for vLLM: an attention backend that keeps keys and values as our codes, in vLLM's pages."""
