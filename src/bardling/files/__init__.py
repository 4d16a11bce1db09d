"""Safe file access: atomic writes, size-limited reads, locks between processes, and pickles read without executing them.

Does not belong here: file formats, which live in the package that owns them.
"""
