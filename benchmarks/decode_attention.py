"""`fade bench attention`, which is fade_fast/measure/decode_attention.py."""

from fade_fast.measure.decode_attention import main

if __name__ == "__main__":
    raise SystemExit(main())
