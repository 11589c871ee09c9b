"""`fade ruler`, which is fade_fast/measure/ruler.py."""

from fade_fast.measure.ruler import main

if __name__ == "__main__":
    raise SystemExit(main())
