"""A decision becomes a changed forward pass."""
