"""Training energies on samples."""
