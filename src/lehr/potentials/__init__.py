"""Time-indexed densities and what is made of them."""
