"""The small model that comes with the project, its LoRAs, and its judge."""
