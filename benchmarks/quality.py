"""`fade quality`, which is fade_fast/measure/quality.py."""

from fade_fast.measure.quality import main

if __name__ == "__main__":
    raise SystemExit(main())
