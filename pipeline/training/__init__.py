"""The trainer behind the `train` stage."""
