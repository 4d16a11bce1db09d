"""Networks: the GPT-2 model and its parts; nothing here knows of data, optimizers or processes."""
