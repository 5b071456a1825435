"""One self-contained HTML page about a run: result table, curves, shapes, samples, and what it was made from."""
