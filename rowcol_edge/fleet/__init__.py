"""Boards that are measured from here: a line to the board, what is copied over it, the run that goes on without it."""
