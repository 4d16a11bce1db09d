"""Optimizers: AdamW and Muon, parameter groups, the EMA of the weights, and optimizer state as named tensors.

What belongs here: everything that updates parameters or stores the state of updates. What does not: learning rate schedules
(`planning/schedules.py`), gradients (`training/step.py`), and how the model is distributed (`distributed/`).
"""
