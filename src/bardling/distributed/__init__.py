"""Processes and devices: who this process is, what it computes on, and in which number format."""
