"""All pairs of adapters: tables of one module, their sums, what they say and what they take."""
