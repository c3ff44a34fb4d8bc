"""Synthetic instruction tasks whose truth is known, in every size, and the pocket models trained on them."""
