"""The study of sampling with fewer network evaluations, on the trained tiny model."""
