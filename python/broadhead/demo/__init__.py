"""`broadhead demo`: a language model from PyPI generates text through paged attention, checked against SDPA."""
