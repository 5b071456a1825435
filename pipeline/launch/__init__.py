"""From a workflow to a finished run: checks, display, tracking, other machines."""
