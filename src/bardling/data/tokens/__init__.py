"""From documents to tokens on disk: tokenizers, preparation, shards and their manifest, and other trainers' token files."""
