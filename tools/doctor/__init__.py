"""What doctor.py looks at, on whatever machine: nothing here needs a package before it was seen to be there."""
