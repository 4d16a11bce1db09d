"""Bardling trains GPTs: from raw text to a model that other software opens."""
