"""What people touch in a WebUI."""
