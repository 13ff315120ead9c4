"""What a person sees of a plan: picture, summary, JSON."""
