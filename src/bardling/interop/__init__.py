"""Other systems' formats: readers that treat files as untrusted input, and writers whose output those systems open.

Does not belong here: our own checkpoints and the choice of a reader (`checkpoint/`).
"""
