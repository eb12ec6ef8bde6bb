"""Who is near whom among very many adapters, without a table of all pairs."""
