"""The operators of the forward pass: one interface, one package for each backend."""
