"""Diffusion models with classifier guidance (Dhariwal and Nichol, 2021, arXiv:2105.05233)."""
