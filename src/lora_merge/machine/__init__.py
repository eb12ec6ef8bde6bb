"""What the computer is: device, worker threads, timing."""
