"""The same work done by minipaged and by other engines, in turns: ``minipaged bench compare``."""
