"""Models on disk; one format a file."""
