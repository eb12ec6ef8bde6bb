"""The recipe: what is wanted, as data, as YAML and in mergekit's words."""
