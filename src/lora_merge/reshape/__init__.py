"""One adapter in, one out: resize, extract, fuse."""
