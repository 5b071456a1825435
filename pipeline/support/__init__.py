"""What knows nothing of workflows: durable files, injected faults, secrets in texts, plots, pages, processes."""
