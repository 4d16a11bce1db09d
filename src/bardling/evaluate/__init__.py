"""Measuring models: loss on held-out text, multiple-choice tasks."""
