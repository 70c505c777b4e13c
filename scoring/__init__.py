"""How close images are to those of the original algorithm, how long they take, and the report of both."""
