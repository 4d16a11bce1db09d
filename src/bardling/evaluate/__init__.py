"""Measuring models: the loss on held-out text, multiple-choice tasks, CORE, and the tasks of lm-eval.

Every process makes the same forward passes: with sharded weights, a pass that one process makes alone never ends. Training
hooks and commands that call these functions do not belong here.
"""
