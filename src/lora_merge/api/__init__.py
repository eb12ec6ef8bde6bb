"""The public functions: whatever a command can do, one call."""
