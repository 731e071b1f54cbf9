"""Runs a call: as one like it ran before, or checked and decided, then by a kernel or by the torch reference."""
