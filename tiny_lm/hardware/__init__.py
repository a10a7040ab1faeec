"""The machine: devices, memory, peak FLOPs, compiler."""
