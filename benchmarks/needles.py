"""`fade needles`, which is fade_fast/measure/needles.py."""

from fade_fast.measure.needles import main

if __name__ == "__main__":
    raise SystemExit(main())
