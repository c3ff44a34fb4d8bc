"""MELT (Laskaridis et al., MobiCom 2024, arXiv 2403.12844): what a language model costs on a device."""
