"""Scripts that make the model, the LoRAs and the judge that ship in `klora/demo`; see training/README.md."""
