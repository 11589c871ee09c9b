"""`fade bench choose`, which is fade_fast/measure/choose.py."""

from fade_fast.measure.choose import main

if __name__ == "__main__":
    raise SystemExit(main())
