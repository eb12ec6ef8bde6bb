"""y += up^T (g * (down x)): the experts of a module, or of several that share an input, at once."""
