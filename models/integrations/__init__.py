"""What other libraries need to know of this package's activations: one module for each library."""
