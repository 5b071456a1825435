"""What stages leave: artifacts by key, their names, and their removal."""
