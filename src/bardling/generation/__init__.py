"""The inference engine: text from a trained model.

Prefill, decoding and the choice of tokens belong here. The model and its KV cache are in `model/`; commands are in `cli/`.
"""
