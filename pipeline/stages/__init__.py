"""Built-in stages, one file each."""
