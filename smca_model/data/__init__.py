"""Detection data in COCO's format: images, annotations, the dataset and its augmentation, and a set of digits."""
