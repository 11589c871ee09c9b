"""`fade memory`, which is fade_fast/measure/memory.py."""

from fade_fast.measure.memory import main

if __name__ == "__main__":
    raise SystemExit(main())
