"""The public functions: they alone choose between the operators of torch.library and running a call at once."""
