"""Numbers become a decision: no models, no files."""
