"""How adapters are written: one table of file formats, each a few small functions."""
