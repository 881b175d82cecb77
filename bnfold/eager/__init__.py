"""A fold written back into the model's own class."""
