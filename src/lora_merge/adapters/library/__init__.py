"""A library: many adapters in one directory, stored by module: a stack is in one file."""
