"""The second classifier: squares round each level, the 3D vision transformer, its loss and its predictions."""
