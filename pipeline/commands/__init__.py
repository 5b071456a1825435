"""The command line: its arguments, and one file per group of commands."""
