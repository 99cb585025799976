"""The benchmark's suites, one module each; bench.py times the cases of all alike.

TITLE               one line for the head of a table
FIXED               options of `bench` that the suite decides itself
cases(args)         its table of cases, as the command line narrows it
conclusions(times)  what else the times of a run say, one line each; {case: milliseconds}
"""
