"""The network: one file that reads like the paper (`gpt.py`), its layers, rotary positions, the KV cache and the initial
weights.

Fast implementations belong in `kernels/`. Nothing here knows about processes, optimizers, files or tokenizers.
"""
