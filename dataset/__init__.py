"""GTA5, Cityscapes, the demo's scenes, and how training walks through them."""
