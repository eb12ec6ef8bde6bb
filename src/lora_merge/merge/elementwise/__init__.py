"""Rules defined entry by entry on the delta, in bands of rows."""
