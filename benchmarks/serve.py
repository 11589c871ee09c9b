"""`fade bench serve`, which is fade_fast/measure/serve.py."""

from fade_fast.measure.serve import main

if __name__ == "__main__":
    raise SystemExit(main())
