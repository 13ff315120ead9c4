"""Scripts that make the model, the LoRAs and the judge of `klora/demo`; see training/README.md."""
