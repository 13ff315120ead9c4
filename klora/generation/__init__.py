"""Pictures from a diffusers pipeline: what is asked for, how it is made, how it is written."""
