"""Comparisons, claims and reports: what is done with the records that the benches make."""
