"""`fade bench generate`, which is fade_fast/measure/generate.py."""

from fade_fast.measure.generate import main

if __name__ == "__main__":
    raise SystemExit(main())
