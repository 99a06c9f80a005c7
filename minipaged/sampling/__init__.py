"""From logits to tokens, and from text to where it stops."""
