"""What commands share: options, output, opening."""
