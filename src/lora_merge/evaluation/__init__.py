"""How good adapters, merges and mixtures are on rows of text, and the search for better merges."""
