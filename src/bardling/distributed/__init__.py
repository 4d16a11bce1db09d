"""Processes and devices: the context of a process, device and dtype selection, the heartbeat, and wrapping the model.

What belongs here: rank and device mesh (`context.py`), how processes meet (`rendezvous.py`) and refuse (`refusals.py`), device,
precision and threads, detection of lost processes, and applying a layout to a model from outside (compile, DDP). What does not:
the model itself, the training step, and the sizes of the mesh (`planning/layout.py`).
"""
