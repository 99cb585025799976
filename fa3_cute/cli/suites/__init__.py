"""The benchmark's suites, one module each; bench.py times the cases of all alike.

TITLE                     one line for the head of a table
SHOWN                     the columns of its tables (shown.py)
FIXED                     options of `bench` that the suite decides itself
cases(args)               its table of cases, as the command line narrows it
conclusions(times, rows)  what else a run says, one line each: our times, {case: milliseconds}, and what bench.py wrote
                          of each case, in the same order
"""
