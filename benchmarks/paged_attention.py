"""Attention of the vLLM plugin over pages, which is fade_fast/measure/paged_attention.py."""

from fade_fast.measure.paged_attention import main

if __name__ == "__main__":
    raise SystemExit(main())
