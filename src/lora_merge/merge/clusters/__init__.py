"""What the units of a LoRA-LEGO merge are made of, and a page that shows it."""
