"""Data sets on disk: tar shards, read by index, in an order that is a pure function."""
