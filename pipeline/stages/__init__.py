"""The built-in stages, one room each, named as in workflow files."""
