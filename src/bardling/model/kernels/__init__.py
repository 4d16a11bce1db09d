"""Fast implementations of the model's operations, each next to a plain reference: linear layers, attention, head loss,
elementwise.

The model calls `linear`, `attention` and `head_loss`, and the functions of `elementwise.py`; `select.py` decides which
implementation runs. Modules with parameters do not belong here, and neither does anything that reads the model's configuration.
"""
