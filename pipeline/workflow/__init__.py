"""From a workflow file to checked nodes and their keys."""
