"""The detectors: YOLO data sets, training, detections, and from these to level points and severity rows."""
