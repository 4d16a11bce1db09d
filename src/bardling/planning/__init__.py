"""Calculations before a run: parameters, FLOPs, memory, batches, schedules, scaling laws, device layout and the plan.

What belongs here: pure functions of a configuration. What does not: anything that needs torch, the device, the tokens of the
dataset or the network.
"""
