"""The command line: one file per command, which parses options, calls the library and prints the result.

Computation does not belong here. torch is imported inside `run`, so that `--help` and errors in options are fast.
"""
