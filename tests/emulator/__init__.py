"""A PTX interpreter on NumPy, and the CUDA runtime that hands it the launches of compiled code."""
