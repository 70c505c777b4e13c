"""Fewer network evaluations towards the same image: recording, fitting, searching and keeping sampling plans."""
