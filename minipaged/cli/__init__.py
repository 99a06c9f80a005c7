"""The ``minipaged`` command: one file a subcommand, options generated from the dataclasses."""
