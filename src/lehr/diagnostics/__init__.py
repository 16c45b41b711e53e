"""A run as an ArviZ tree, as tables and as pictures."""
