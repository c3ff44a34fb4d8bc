"""MegaScale (Jiang et al., NSDI 2024, arXiv 2402.15627)."""
