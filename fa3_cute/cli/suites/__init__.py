"""The benchmark's suites, one module each: `cases(args)` is its table of cases; bench.py times them all alike."""
