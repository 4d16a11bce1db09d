"""Checkpoints and run folders: folders that appear complete or not at all, what is in them, and opening or exporting a model.

Does not belong here: when to save (`training/`), and other systems' formats (`interop/`).
"""
