"""The tier that needs a CUDA device. Its bodies also run on the CPU, in the fast tier."""
