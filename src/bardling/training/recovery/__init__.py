"""Surviving faults: bad steps and rollbacks with their explanations, too little memory, deadlines and stop signals.

What does not belong here: dead or stuck processes (`distributed/heartbeat.py`), damaged checkpoints (`checkpoint/`), and the
decision whether to apply an update, which is part of the step itself (`training/step.py`).
"""
