"""Losses, images, checkpoints and the machine: what the two scripts share."""
