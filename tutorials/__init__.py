"""The course: notebooks in two languages, made from one text source per step (see README.md beside this file)."""
