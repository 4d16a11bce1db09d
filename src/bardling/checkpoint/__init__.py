"""Checkpoints: folders that appear whole or not at all, and what is in them."""
