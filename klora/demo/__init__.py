"""The small model that comes with the project: procedural pictures, a judge, the pipeline and its LoRAs."""
