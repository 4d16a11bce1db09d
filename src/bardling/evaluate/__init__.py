"""Measuring models: the loss on held-out text, and multiple-choice tasks.

Every process makes the same forward passes: with sharded weights, a pass that one process makes alone never ends. Training
hooks and commands that call these functions do not belong here.
"""
