"""The command line: one file a verb, each of them parsing and printing only."""
