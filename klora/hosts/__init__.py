"""Where modules, files and steps come from."""
