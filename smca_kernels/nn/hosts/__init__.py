"""SMCA inside detectors of others: each module changes the co-attention of one library's DETR, and imports only that.

transformers.py    Hugging Face's DETR and Conditional DETR
detr.py            a model of facebookresearch/detr, by the names of its attributes
"""
