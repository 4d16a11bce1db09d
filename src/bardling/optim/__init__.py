"""The optimizer, its learning rate and its state as named tensors."""
