"""SMCA inside detectors of others, by one call each.

    transformers/      Hugging Face's DETR and Conditional DETR
    detr.py            a model of facebookresearch/detr, by the names of its attributes
    grids.py           what both ask of a host: options of the prior, one stride, sizes of the images

Nothing here is imported with the library. docs/hosts.md says which hosts there are.
"""
