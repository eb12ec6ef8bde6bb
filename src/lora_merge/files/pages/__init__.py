"""What people look at: cards, pages, pictures."""
