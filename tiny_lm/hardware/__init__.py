"""What the machine has: devices, free memory, peak FLOPs, a compiler."""
