"""The balance that finds itself: the LoRAs of a pair say how much of each a picture shows. Numbers only, no models."""
