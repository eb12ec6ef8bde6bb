"""What touches every token: the operations that a GPU should run in a few launches."""
