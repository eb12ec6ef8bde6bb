"""Which names mean one module: renaming on request, and spellings of one base model."""
