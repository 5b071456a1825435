"""What runs next, and what is committed."""
