"""A finished run repeated, disturbed, described."""
