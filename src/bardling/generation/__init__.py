"""The inference engine: text from a trained model.

Prefill, decoding, the choice of tokens, chat templates and conversations belong here. The model and its KV cache are in
`model/`; commands are in `cli/`.
"""
