"""Speculative decoding: guess the next tokens cheaply, check all guesses in one step of the model."""
