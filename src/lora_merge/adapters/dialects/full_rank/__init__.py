"""Changes of full rank, read on request alone, to be cut with the error told."""
