"""What a gate is: signal, granularity, activation."""
