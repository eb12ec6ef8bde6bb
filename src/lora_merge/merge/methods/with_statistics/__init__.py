"""Methods that need to know what the modules see: `collect_statistics`."""
