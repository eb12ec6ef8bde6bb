"""Results as tables and pictures of characters."""
