"""Models as NumPyro programs, and the path of densities that a program spans."""
