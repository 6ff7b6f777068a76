"""Learn the order of a teacher from frozen features, and say degrees: calibration and shares."""
