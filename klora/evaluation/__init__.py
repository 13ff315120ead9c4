"""The protocol of K-LoRA's Table 1 on files of one's own (docs/evaluate.md)."""
