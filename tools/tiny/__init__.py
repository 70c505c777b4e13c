"""Data, training and measurement of the tiny model."""
