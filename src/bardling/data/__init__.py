"""From text to batches of tokens. Import from the modules; this package imports nothing, so that the command line is fast."""
