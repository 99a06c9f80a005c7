"""One small adapter for each family of architectures: its features, and where its tensors are."""
