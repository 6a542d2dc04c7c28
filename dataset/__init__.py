"""Data sets (GTA5, SYNTHIA, Cityscapes, folders of images), their labels and classes, the input pipeline."""
