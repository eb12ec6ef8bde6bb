"""What a mixture does on texts."""
