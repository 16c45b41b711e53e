"""What is raised for a checkpoint that cannot be trusted to be what it says."""

__all__ = ["CheckpointError"]


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged, or not what its card says."""
